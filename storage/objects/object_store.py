"""Named objects under one root: a local path, `memory://` or `s3://`.

Local writes are durable when the call returns: data is fsynced, and so is the directory that names
it. `publish` and `create` make an object appear whole or not at all; of several concurrent creates
of one object, one succeeds. Servers get a single PUT, which is atomic. There are no locks: a disk
shared by many machines works like any other. Failures become this package's errors; absence stays
`FileNotFoundError`.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from storage.errors import ConfigError
from storage.objects.buffer_pool import Allocate
from storage.objects.failures import translated
from storage.objects.listing import Entry, list_objects
from storage.objects.local_files import (
    TEMPORARY_SUFFIX,
    new_file,
    sync_folder,
    sync_names,
    sync_tree,
    temporary_file,
    write_file,
)
from storage.objects.retry import retried
from storage.objects.server_answers import lacks_reason

Result = TypeVar("Result")

S3_SCHEMES = ("s3://", "s3a://")
PIECE_BYTES = 4 << 20
RANGE_BYTES = 32 << 20
"""Size of the ranges in which a large object is read from a server, all at the same time."""


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A root and the objects below it. Keys are relative, with forward slashes."""

    file_system: fsspec.AbstractFileSystem
    root: str

    @classmethod
    def at(cls, url: str) -> Self:
        """Return the object store at a local path or an fsspec URL; it need not exist.

        The file system's own client finds the credentials, for S3 in the usual AWS variables and
        files. In the URL they would end up in logs and records, so they raise ConfigError. So do
        characters that fsspec reads as a chain of file systems or, on a server, as a pattern.
        """
        scheme, separator, rest = url.partition("://")
        if "::" in url or (separator and set("*?[") & set(rest)):
            raise ConfigError(
                f"a store cannot be at {url}: `::` anywhere, and `*`, `?` or `[` in a URL, have a "
                "special meaning; choose another name"
            )
        if separator and "@" in rest.partition("/")[0]:
            raise ConfigError(
                f"the {scheme} URL contains credentials; remove the part before the @ and set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        file_system, root = _file_system(url)
        return cls(file_system, str(root).rstrip("/"))

    def __reduce__(self) -> tuple[Callable[[str], "ObjectStore"], tuple[str]]:
        """Pickle as a URL, without the file system's options and the credentials among them."""
        return ObjectStore.at, (self.url,)

    @property
    def url(self) -> str:
        """The root as `ObjectStore.at` takes it: a path on a disk, else a URL with its scheme."""
        return self.root if self.is_local else str(self.file_system.unstrip_protocol(self.root))

    @property
    def is_local(self) -> bool:
        """Return whether objects are files that can be fsynced."""
        return isinstance(self.file_system, LocalFileSystem)

    def path(self, key: str) -> str:
        """Return the path of an object for the file system."""
        return f"{self.root}/{key}" if key else self.root

    def where(self, key: str) -> str:
        """Return the path of an object for messages: with the scheme of a URL."""
        return f"{self.url}/{key}" if key else self.url

    def read(self, key: str) -> bytes:
        """Return an object's bytes; FileNotFoundError if there is none."""
        options = self._whole_read
        data: bytes = self._attempted(
            key, lambda: self.file_system.cat_file(self.path(key), **options)
        )
        return data

    @property
    def _whole_read(self) -> Mapping[str, int]:
        """Return the options for a single GET: s3fs would request the size, then parts."""
        return {"max_concurrency": 1} if "s3" in self.file_system.protocol else {}

    def read_many(self, keys: Sequence[str], *, absent_ok: bool = False) -> Mapping[str, bytes]:
        """Return the bytes of small objects by key; from a server, many at a time.

        Raises:
            FileNotFoundError: one of them is absent, and not `absent_ok`.

        """
        if self.is_local or len(keys) < 2:
            read: dict[str, bytes] = {}
            for key in keys:
                try:
                    read[key] = self.read(key)
                except FileNotFoundError:
                    if not absent_ok:
                        raise
            return read
        keys_left = {self.path(key): key for key in keys}
        found: dict[str, bytes] = {}

        def read_remaining() -> None:  # a retry repeats only the requests that failed
            got = self.file_system.cat(list(keys_left), on_error="return", **self._whole_read)
            failed = [value for value in got.values() if isinstance(value, BaseException)]
            for path, value in got.items():
                if isinstance(value, bytes):
                    found[keys_left.pop(path)] = value
                elif absent_ok and isinstance(value, FileNotFoundError):
                    del keys_left[path]
                    failed.remove(value)
            for error in sorted(failed, key=lambda one: not isinstance(one, FileNotFoundError)):
                raise error

        self._attempted(keys[0], read_remaining)
        return {key: found[key] for key in keys if key in found}

    def read_large(
        self, key: str, *, num_bytes: int, allocate: Allocate = np.empty
    ) -> bytes | memoryview:
        """Return an object's bytes like `read`, faster if it is large and has about `num_bytes`.

        A file is read into memory with larger pages, an object on a server in parallel ranges.
        """
        if not self.is_local:
            return self._read_parts(key, num_bytes)
        with (
            translated(self.where(key), is_local=self.is_local),
            Path(self.path(key)).open("rb", buffering=0) as file,
        ):
            data = allocate((os.fstat(file.fileno()).st_size,), np.uint8)
            filled = 0
            while filled < len(data):  # a read may return less than it was asked for
                found = file.readinto(data.data[filled:])
                if not found:
                    raise FileNotFoundError(f"{self.where(key)} ended early: it is being rewritten")
                filled += found
            return data.data

    def pieces(self, key: str, *, num_bytes: int) -> Iterator[bytes | memoryview]:
        """Yield an object's bytes piece by piece; a piece is valid until the next one.

        Failures are not retried here: start over (`storage.objects.retry`).
        """
        if not self.is_local:
            yield self._read_parts(key, num_bytes)
            return
        with (
            translated(self.where(key), is_local=self.is_local),
            Path(self.path(key)).open("rb", buffering=0) as file,
        ):
            buffer = memoryview(bytearray(min(max(num_bytes, 1), PIECE_BYTES)))
            while found := file.readinto(buffer):
                yield buffer[:found]

    def _read_parts(self, key: str, num_bytes: int) -> bytes:
        if num_bytes <= RANGE_BYTES:
            return self.read(key)
        starts = list(range(0, num_bytes, RANGE_BYTES))
        ends = [*starts[1:], None]  # the last range is open-ended
        paths = [self.path(key)] * len(starts)

        def read_all() -> bytes:
            return b"".join(self.file_system.cat_ranges(paths, starts, ends, on_error="raise"))

        try:
            return self._attempted(key, read_all)
        except ConfigError:  # the object is shorter: a range is beyond its end
            return self.read(key)

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""

        def check() -> bool:
            self.file_system.invalidate_cache()  # other processes write too
            try:  # `isfile` would take a server failure for an absent object
                return bool(self.file_system.info(self.path(key))["type"] == "file")
            except FileNotFoundError:
                return False
            except OSError as error:
                if not lacks_reason(error):
                    raise
                try:
                    self.file_system.cat_file(self.path(key), start=0, end=1)
                except FileNotFoundError:
                    return False
                return True

        return self._attempted(key, check)

    def sizes(self, prefix: str) -> Mapping[str, int]:
        """Return the size of every object below `prefix`, by key relative to it."""
        return {key: entry.num_bytes for key, entry in self.entries(prefix).items()}

    def entries(self, prefix: str) -> Mapping[str, Entry]:
        """Return the listing entry of every object below `prefix`, by key relative to it."""
        base = self.path(prefix)

        def find() -> Mapping[str, Entry]:
            self.file_system.invalidate_cache()
            return list_objects(self.file_system, base)

        try:
            found = self._attempted(prefix, find)
        except FileNotFoundError as error:  # S3 lists a prefix without objects, but no lost bucket
            raise ConfigError(
                f"cannot list {self.where(prefix)}: {error}; create the bucket, or correct the path"
            ) from error
        return {  # a server may list the folder itself, as an empty object without a name
            path[len(base) + 1 :]: entry for path, entry in sorted(found.items()) if path != base
        }

    def temporaries(self) -> Mapping[str, Entry]:
        """Return the temporary files that kills left directly below the root; none on a server."""
        found: dict[str, Entry] = {}
        with translated(self.where(""), is_local=self.is_local):
            for path in Path(self.root).glob(f"*{TEMPORARY_SUFFIX}") if self.is_local else ():
                with suppress(FileNotFoundError):  # it was finished meanwhile
                    status = path.stat()
                    found[path.name] = Entry(num_bytes=status.st_size, modified=status.st_mtime)
        return found

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write an object; it is durable once `flush` was called on a prefix of its key."""
        if self.is_local:
            self._attempted(key, lambda: write_file(Path(self.path(key)), data))
        else:
            self._put(key, bytes(data), mode="overwrite")

    @contextmanager
    def open(self, key: str) -> Iterator[Callable[[bytes], object]]:
        """Write an object piece by piece; like `write` once the block has ended without an error.

        A failure leaves a partial file on a disk, and nothing on a server.
        """
        if not self.is_local:
            pieces = io.BytesIO()
            yield pieces.write
            self.write(key, pieces.getvalue())
            return
        where = self.where(key)
        with translated(where, is_local=True), new_file(Path(self.path(key))) as append:
            yield append

    def _put(self, key: str, data: bytes, *, mode: str) -> None:
        try:
            self._attempted(
                key, lambda: self.file_system.pipe_file(self.path(key), data, mode=mode)
            )
        except FileNotFoundError as error:
            raise ConfigError(
                f"cannot write {self.where(key)}: {error}; create the bucket, or correct the path"
            ) from error

    def flush(self, prefix: str) -> None:
        """Make the names of all objects below `prefix` durable, and those of its parents."""
        if not self.is_local:
            return
        with translated(self.where(prefix), is_local=self.is_local):
            folder = Path(self.path(prefix))
            sync_tree(folder)
            sync_names(folder.parent, root=Path(self.root))

    def publish(self, key: str, data: bytes) -> None:
        """Make an object appear, or replace it, atomically and durably."""
        if not self.is_local:
            self.write(key, data)
            return
        with self._beside(key, data) as (temporary, path):
            temporary.replace(path)

    def create(self, key: str, data: bytes) -> bool:
        """Publish an object unless it exists; return whether it did not.

        Without hard links or conditional writes, the later of two concurrent creates wins.
        """
        if self.exists(key):
            return False
        if not self.is_local:
            return self._create_on_server(key, data)
        with self._beside(key, data) as (temporary, path):
            try:
                path.hardlink_to(temporary)  # a rename would overwrite
            except FileExistsError:
                return False
            except OSError:  # no hard links here, or not this one; else the rename fails
                temporary.replace(path)
        return True

    def _create_on_server(self, key: str, data: bytes) -> bool:
        try:
            self._put(key, data, mode="create")
        except FileExistsError:
            return False
        except ConfigError:  # perhaps no conditional writes; else the plain write fails
            self.write(key, data)
        return True

    @contextmanager
    def _beside(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """Write a temporary file; the block renames or links it. Durable after the block."""
        with translated(self.where(key), is_local=self.is_local):
            path = Path(self.path(key))
            with temporary_file(path, data) as temporary:
                yield temporary, path
            sync_names(path.parent, root=Path(self.root))

    def delete(self, key: str) -> None:
        """Remove an object durably; it may be absent already."""
        with suppress(FileNotFoundError):
            self._attempted(key, lambda: self.file_system.rm_file(self.path(key)))
            if self.is_local:
                with translated(self.where(key), is_local=self.is_local):
                    sync_folder(Path(self.path(key)).parent)

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove objects; any may be absent already. On S3, a thousand per request."""
        if keys and "s3" in self.file_system.protocol:
            paths = [self.path(key) for key in keys]
            self._attempted(keys[0], lambda: self.file_system.rm(paths))
            return
        for key in keys:
            with suppress(FileNotFoundError):
                self._attempted(key, partial(self.file_system.rm_file, self.path(key)))
        for parent in {key.rpartition("/")[0] for key in keys} if self.is_local else ():
            with (
                translated(self.where(parent), is_local=self.is_local),
                suppress(FileNotFoundError),
            ):
                sync_folder(Path(self.path(parent)))

    def delete_all(self, prefix: str) -> None:
        """Remove every object below `prefix`."""
        for key in self.sizes(prefix):
            self.delete(f"{prefix}/{key}")

    def free_bytes(self) -> int | None:
        """Return the free space of the disk below the root, or None if it is not on a disk."""
        if not self.is_local:
            return None
        path = Path(self.root)
        while not path.exists():
            path = path.parent
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def _attempted(self, key: str, call: Callable[[], Result]) -> Result:
        def attempt() -> Result:
            with translated(self.where(key), is_local=self.is_local):
                return call()

        return retried(attempt)


def _file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it; on S3, one that does not retry.

    s3fs and botocore below it try five times each; with `retried` above them that would be a
    hundred requests and minutes until they give up.
    """
    if not url.startswith(S3_SCHEMES):
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    once = {"retries": {"total_max_attempts": 1}}
    file_system, root = fsspec.core.url_to_fs(url, config_kwargs={**once, **given})
    file_system.retries = 1
    return file_system, root
