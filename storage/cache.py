"""A local copy of remote objects under a hard size limit.

Objects lie under their content's digest, so a cached copy that is not what was committed is
recognised, dropped and fetched again. Everything here can be fetched again: the whole folder may be
deleted at any time. Several processes may share one folder.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.record import ObjectDigest


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectCache:
    """Objects by digest in one local folder."""

    folder: Path
    limit_bytes: int

    def fetch(self, expected: ObjectDigest, remote: Callable[[], bytes]) -> bytes:
        """Return the object from the cache if it is there and whole, else from `remote`.

        What `remote` returns is kept only if it is what was committed; the caller checks it too.
        """
        path = self.folder / expected.xxh3_128
        with suppress(FileNotFoundError):
            data = path.read_bytes()
            if ObjectDigest.of(data) == expected:
                os.utime(path)  # the least recently used goes first
                return data
            path.unlink()
        data = remote()
        if ObjectDigest.of(data) == expected and len(data) <= self.limit_bytes:
            self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(len(data))
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)

    def _make_room(self, num_bytes: int) -> None:
        entries: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process evicts too
                status = path.stat()
                entries.append((status.st_mtime, status.st_size, path))
        used = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if used + num_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            used -= size
