"""Claims of threads and processes on names: one does the work, the others wait for its result.

A claim is a lock of the system on a file. It ends with the process that holds it, however that
ends, so that a killed process blocks no other. Names share a fixed number of files: two names may
meet in one, and then the work on one waits for the other.
"""

import fcntl
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NUM_FILES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """Claims of all that use one folder of a file system with locks."""

    folder: Path
    """Made when it is needed. Nobody may hold two of its claims at a time."""

    @contextmanager
    def claim(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the claim on `name` while the block runs.

        Yields True. Without `wait`, False if another has it: then nothing is held.

        Raises:
            OSError: the folder cannot be used.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{zlib.crc32(name.encode()) % NUM_FILES:03x}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield _lock(descriptor, wait=wait)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
