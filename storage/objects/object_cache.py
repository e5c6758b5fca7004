"""A local cache of remote objects with a hard size limit.

Objects are named by the digest of their content, so a cached copy that differs from what was
committed is detected, deleted and fetched again. Every file with such a name can be fetched again
and may be deleted at any time; nothing else in the folder is touched. Several processes may share
one folder: the limit applies to all of them together.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ConfigError, OutOfSpaceError
from storage.objects.digests import ObjectDigest
from storage.objects.failures import FULL
from storage.objects.local_files import TEMPORARY_SUFFIX

OURS = re.compile(rf"[0-9a-f]{{32}}({re.escape(TEMPORARY_SUFFIX)})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectCache:
    """Objects by digest in one local folder."""

    folder: Path
    limit_bytes: int
    """Limit for the size of all objects together, at any moment."""

    def fetch(self, expected: ObjectDigest, remote: Callable[[], bytes]) -> bytes:
        """Return the object from the cache if it is there and intact, else from `remote`.

        The result of `remote` is kept only if it matches `expected`; the caller checks it too.
        Raise OutOfSpaceError if the disk is full before the limit is reached.
        """
        path = self.folder / expected.xxh3_128
        with self._translated(), suppress(FileNotFoundError):
            data = path.read_bytes()
            if ObjectDigest.of(data) == expected:
                os.utime(path)  # the least recently used is evicted first
                return data
            path.unlink()
        data = remote()
        if ObjectDigest.of(data) == expected and len(data) <= self.limit_bytes:
            with self._translated():
                self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        with self._locked():
            self._make_room(len(data))
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Evict until `num_bytes` more fit; a temporary object is left by a killed process."""
        entries: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            if not OURS.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):  # a reader may delete a bad copy
                status = path.stat()
                age = 0.0 if path.name.endswith(TEMPORARY_SUFFIX) else status.st_mtime
                entries.append((age, status.st_size, path))
        used = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if used + num_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            used -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder: two processes that make room at once would exceed the limit."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise OutOfSpaceError(
                    f"no space left for the object cache {self.folder}, which may take "
                    f"{self.limit_bytes} bytes: free space, lower its limit or move it"
                ) from error
            raise ConfigError(f"cannot use {self.folder} as an object cache: {error}") from error
