"""The total size of a cache folder, and what is evicted first, without listing it each time.

The total is written down beside the objects. It counts only if the folder has not changed since by
other hands, which its modification time tells, and no change was begun without being completed: a
killed process leaves such a one. A process lists the folder once at its start, and whenever the
total is in doubt.
"""

import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from storage.objects.local_files import TEMPORARY_SUFFIX

BOOKS = ".eyas"
"""Folder below the cache's that holds no objects."""
_TOTAL = "total"
_IN_DOUBT = ""
_OBJECT = re.compile(rf"[0-9a-f]{{32}}({re.escape(TEMPORARY_SUFFIX)})?")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class _Entry:
    """A file as it was when the folder was listed; the first to evict sorts first."""

    is_complete: bool
    """A temporary object was left by a killed process."""
    modified: int
    num_bytes: int
    name: str


class CacheContents:
    """What a cache folder holds, for one process that has locked it."""

    def __init__(self, folder: Path) -> None:
        """Look at the folder when it is first changed."""
        self._folder = folder
        self._record = folder / BOOKS / _TOTAL
        self._oldest: deque[_Entry] = deque()
        self._is_listed = False

    @contextmanager
    def changing(self) -> Iterator["CacheChange"]:
        """Yield a change of the locked folder; until the block ends well, the total is in doubt."""
        recorded = self._recorded() if self._is_listed else None
        change = CacheChange(self, self._take_stock() if recorded is None else recorded)
        self._record.parent.mkdir(exist_ok=True)
        self._record.write_text(_IN_DOUBT, encoding="ascii")
        yield change
        record = f"{change.total_bytes} {self._modified()}"
        self._record.write_text(record, encoding="ascii")

    def _take_stock(self) -> int:
        """List the folder and return its total size."""
        entries = []
        with os.scandir(self._folder) as listing:
            for found in listing:
                if _OBJECT.fullmatch(found.name):
                    with suppress(FileNotFoundError):  # a reader may delete a bad copy
                        entries.append(_entry(found))
        self._oldest, self._is_listed = deque(sorted(entries)), True
        return sum(entry.num_bytes for entry in entries)

    def evict(self) -> int | None:
        """Delete the least recently used object; return its size, None if there is no object.

        What was used since the folder was listed is passed over: it is younger than the rest.
        """
        while True:
            if not self._oldest:
                self._take_stock()
            if not self._oldest:
                return None
            listed = self._oldest.popleft()
            path = self._folder / listed.name
            with suppress(FileNotFoundError):
                if path.lstat().st_mtime_ns == listed.modified:
                    path.unlink()
                    return listed.num_bytes

    def _recorded(self) -> int | None:
        """Return the recorded total, or None if it is in doubt."""
        try:
            total, modified = map(int, self._record.read_text(encoding="ascii").split())
        except (FileNotFoundError, ValueError):
            return None
        return total if modified == self._modified() else None

    def _modified(self) -> int:
        return self._folder.stat().st_mtime_ns


class CacheChange:
    """A change of the folder's contents that is being made."""

    def __init__(self, contents: CacheContents, total_bytes: int) -> None:
        self._contents = contents
        self.total_bytes = total_bytes

    def make_room(self, num_bytes: int, *, limit_bytes: int) -> None:
        """Evict the least recently used objects until `num_bytes` more fit."""
        while self.total_bytes + num_bytes > limit_bytes:
            freed = self._contents.evict()
            if freed is None:
                return
            self.total_bytes -= freed


def _entry(found: "os.DirEntry[str]") -> _Entry:
    status = found.stat(follow_symlinks=False)
    return _Entry(
        is_complete=not found.name.endswith(TEMPORARY_SUFFIX),
        modified=status.st_mtime_ns,
        num_bytes=status.st_size,
        name=found.name,
    )
