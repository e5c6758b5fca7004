"""Retry transient failures: bounded, with growing pauses and jitter."""

import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from storage.errors import TransientError

Result = TypeVar("Result")

PAUSES_SECONDS = (0.1, 0.5, 2.0, 5.0, 10.0)


def retried(
    attempt: Callable[[], Result], *, pauses_seconds: Sequence[float] = PAUSES_SECONDS
) -> Result:
    """Return the result of `attempt`; call it again after a TransientError, once per pause.

    Pauses vary between half and all of their length, so that readers do not retry in lockstep.
    """
    for pause in pauses_seconds:
        try:
            return attempt()
        except TransientError:
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter is no secret
    return attempt()
