"""A local cache of remote objects with a hard size limit.

Objects are named by the digest of their content, so a cached copy that differs from what was
committed is detected, deleted and fetched again. Every file with such a name can be fetched again
and may be deleted at any time; nothing else in the folder is touched. Several processes may share
one folder: the limit applies to all of them together, and an object that several of them miss is
fetched by one.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from storage.errors import ConfigError, OutOfSpaceError
from storage.objects.cache_contents import BOOKS, CacheContents
from storage.objects.claims import Claims
from storage.objects.digests import ObjectDigest
from storage.objects.failures import FULL
from storage.objects.local_files import TEMPORARY_SUFFIX


class ObjectCache:
    """Objects by digest in one local folder."""

    def __init__(self, *, folder: Path, limit_bytes: int) -> None:
        """Keep at most `limit_bytes` of objects in `folder`, all together and at any moment."""
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._claims = Claims(folder=folder / BOOKS)
        self._contents = CacheContents(folder)

    def fetch(self, expected: ObjectDigest, remote: Callable[[], bytes]) -> bytes:
        """Return the object from the cache if it is there and intact, else from `remote`.

        Of all threads and processes that miss an object at the same time, one calls `remote`, and
        the others wait for it. If it fails or is killed, the next one does. The result of `remote`
        is kept only if it matches `expected`; the caller checks it too. Raise OutOfSpaceError if
        the disk is full before the limit is reached.
        """
        data = self._cached(expected)
        if data is not None:
            return data
        if expected.num_bytes > self.limit_bytes:  # nobody would find it here
            return remote()
        with self._claimed(expected.xxh3_128):
            data = self._cached(expected)
            if data is None:
                data = remote()
                if ObjectDigest.of(data) == expected:
                    with self._translated():
                        self._keep(self.folder / expected.xxh3_128, data)
        return data

    def _cached(self, expected: ObjectDigest) -> bytes | None:
        path = self.folder / expected.xxh3_128
        with self._translated(), suppress(FileNotFoundError):
            data = path.read_bytes()
            if ObjectDigest.of(data) == expected:
                os.utime(path)  # the least recently used is evicted first
                return data
            path.unlink()
        return None

    def _keep(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        with self._locked(), self._contents.changing() as change:
            change.make_room(len(data), limit_bytes=self.limit_bytes)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            change.total_bytes += len(data)

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        with ExitStack() as held:
            with self._translated():
                held.enter_context(self._claims.claim(name))
            yield

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

    def __getstate__(self) -> Mapping[str, object]:
        """Pickle what it is called with: another process looks at the folder for itself."""
        return {"folder": self.folder, "limit_bytes": self.limit_bytes}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        """Start as a new one."""
        self.__init__(**state)  # type: ignore[misc]
