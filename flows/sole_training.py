"""One training of a run at a time: two would mix their checkpoints and curves in one folder."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.errors import RunBusyError

LOCK_NAME = ".training"

logger = logging.getLogger(__name__)


@contextmanager
def sole_training(run_path: Path) -> Iterator[None]:
    """Hold a run's folder while the block trains into it; a kill lets go of it too.

    Raises:
        RunBusyError: another process of this machine trains this run.

    """
    run_path.mkdir(parents=True, exist_ok=True)
    with (run_path / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunBusyError(
                f"another process is training run {run_path}; wait for it or cancel it, or train "
                "under another run name (--run, or `run` in the Prefect UI)"
            ) from error
        except OSError as error:  # some network file systems lock nothing
            logger.warning("%s cannot be locked (%s): train it once at a time", run_path, error)
        yield
