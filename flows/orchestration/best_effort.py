"""Optional output: an unreachable server or a full disk loses the output, never the work."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Turn any error in the block into a warning that names `what`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the work itself is done)
        logger.warning("%s is skipped: %s: %s", what, type(error).__name__, error)
