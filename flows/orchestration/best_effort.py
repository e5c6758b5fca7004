"""What is shown beside the work: a server that is away or a full disk costs it, never the work."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in the block into a warning that names `what`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the work beside it is done)
        logger.warning("%s is left out: %s: %s", what, type(error).__name__, error)
