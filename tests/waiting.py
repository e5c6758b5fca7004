"""Waiting for a condition: never for a time, and with a limit that only a hang reaches."""

import time
from collections.abc import Callable

LIMIT_SECONDS = 300.0


def wait_for(condition: Callable[[], bool], *, what: str, every_seconds: float = 0.3) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_SECONDS:.0f} s for {what}"
        time.sleep(every_seconds)
