"""Named objects under one root, wherever the root is: a local path, `memory://` or `s3://`.

Local writes are durable when the call returns: data is fsynced, and so is the directory that names
it. `publish` makes an object appear whole or not at all. Other places get one PUT, which is that by
itself. Failures become this package's errors; absence stays `FileNotFoundError`.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem

from storage.errors import ConfigError, OutOfSpaceError, TransientError
from storage.retry import retried

TEMPORARY_SUFFIX = ".tmp"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Directory:
    """A root and the objects below it. Keys are relative, with forward slashes."""

    file_system: fsspec.AbstractFileSystem
    root: str

    @classmethod
    def at(cls, url: str) -> Self:
        """Return the directory at a local path or an fsspec URL; it need not exist."""
        file_system, root = fsspec.core.url_to_fs(url)
        return cls(file_system, str(root).rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Tell whether objects are files that can be fsynced and locked."""
        return isinstance(self.file_system, LocalFileSystem)

    def path(self, key: str) -> str:
        """Return where an object lies."""
        return f"{self.root}/{key}" if key else self.root

    def read(self, key: str) -> bytes:
        """Return an object's bytes; FileNotFoundError if there is none."""

        def fetch() -> bytes:
            with self._translated(key):
                data: bytes = self.file_system.cat_file(self.path(key))
            return data

        return retried(fetch)

    def exists(self, key: str) -> bool:
        """Tell whether there is such an object."""
        with self._translated(key):
            self.file_system.invalidate_cache()  # other processes write too
            return bool(self.file_system.isfile(self.path(key)))

    def sizes(self, prefix: str) -> Mapping[str, int]:
        """Return the size of every object below `prefix`, by key relative to it."""
        base = self.path(prefix)
        with self._translated(prefix):
            self.file_system.invalidate_cache()
            try:
                found = self.file_system.find(base, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(base) + 1 :]: entry["size"] for path, entry in sorted(found.items())}

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write an object; it is durable once `flush` was called on a prefix of its key."""

        def put() -> None:
            with self._translated(key):
                if self.is_local:
                    _write_file(Path(self.path(key)), data)
                else:
                    self.file_system.pipe_file(self.path(key), bytes(data))

        retried(put)

    def flush(self, prefix: str) -> None:
        """Make the names of all objects below `prefix` durable, and those of its parents."""
        if not self.is_local:
            return
        with self._translated(prefix):
            for directory, _, _ in os.walk(self.path(prefix), topdown=False):
                _sync_directory(Path(directory))
            self._sync_parents(Path(self.path(prefix)))

    def publish(self, key: str, data: bytes, *, replace: bool = True) -> None:
        """Make an object appear, or replace it, atomically and durably."""
        parent = key.rpartition("/")[0]
        with self._translated(key), self.exclusive(parent):
            if not replace and self.exists(key):
                return
            if not self.is_local:
                self.write(key, data)
                return
            path = Path(self.path(key))
            temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
            _write_file(temporary, data)
            temporary.replace(path)
            _sync_directory(path.parent)
            self._sync_parents(path.parent)

    def delete(self, key: str) -> None:
        """Remove an object durably; it may be absent already."""
        with self._translated(key), suppress(FileNotFoundError):
            self.file_system.rm_file(self.path(key))
            if self.is_local:
                _sync_directory(Path(self.path(key)).parent)

    def _sync_parents(self, path: Path) -> None:
        """Make the names of the directories down to `path` durable, the root's own included."""
        root = Path(self.root)
        for parent in path.parents:
            if parent == root.parent or parent.is_relative_to(root):
                _sync_directory(parent)

    def delete_all(self, prefix: str) -> None:
        """Remove every object below `prefix`."""
        for key in self.sizes(prefix):
            self.delete(f"{prefix}/{key}")

    def free_bytes(self) -> int | None:
        """Return the free space of the disk below the root, or None where that has no meaning."""
        if not self.is_local:
            return None
        path = Path(self.root)
        while not path.exists():
            path = path.parent
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    @contextmanager
    def exclusive(self, prefix: str) -> Iterator[None]:
        """Hold the one writer's place below `prefix` on this machine; a second writer waits.

        The lock is on the directory itself: it leaves no file behind and goes with its process.
        Elsewhere two writers both write: the same bytes, or bytes that the digests then refuse.
        """
        if not self.is_local:
            yield
            return
        path = Path(self.path(prefix))
        with self._translated(prefix):
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (BotoCoreError, ClientError, aiohttp.ClientError) as error:
            raise TransientError(f"{self.path(key)}: {type(error).__name__}: {error}") from error
        except OSError as error:
            path = self.path(key)
            if error.errno in FULL:
                raise OutOfSpaceError(
                    f"no space left to write {path}: {error.strerror}; free space or raise the "
                    "quota, then run the same command again: it goes on where it stopped"
                ) from error
            if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
                raise ConfigError(f"cannot use {path}: {error}") from error
            raise TransientError(f"{path}: {type(error).__name__}: {error}") from error


def _write_file(path: Path, data: bytes | memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
