"""The files of a source, at any fsspec location or in a Python package."""

import errno
import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from eagle_core.errors import (
    ConfigError,
    CorruptError,
    DiskError,
    EagleCoreError,
    TransientError,
)

_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv")
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 8 << 20
_AWAY = frozenset({"TimeoutError", "ConnectionError", "HTTPClientError", "TransportError"})
"""Classes of Python, requests, botocore and httpx for a server that does not answer, by name: each
library of a file system has its own, and may not be installed."""
_WORTH_ANOTHER_TRY = (408, 425, 429)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source."""

    filesystem: Any
    """An fsspec file system."""
    path: str
    size: int
    commit: str | None = None
    """Of a file on the hub: the commit that it is read from."""

    @property
    def name(self) -> str:
        """Last part of the path, used in messages and in the ledger."""
        return PurePosixPath(self.path).name

    def identity(self) -> dict[str, object]:
        """Return what identifies the content exactly."""
        pinned = {"commit": self.commit} if self.commit else {}
        return {"name": self.name, "size": self.size, "digest": self.digest(), **pinned}

    def digest(self) -> str:
        """Return xxh3_128 of a local file's bytes; else the checksum of the hub or file system."""
        with source_errors(self.path):
            if self.commit is not None:
                return f"git:{self.filesystem.info(self.path)['blob_id']}"
            if not isinstance(self.filesystem, LocalFileSystem):
                return f"checksum:{self.filesystem.checksum(self.path)}"
            digest = xxhash.xxh3_128()
            with self.filesystem.open(self.path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
            return f"xxh3_128:{digest.hexdigest()}"


def data_suffix(name: str) -> str:
    """Return the suffix without a compression suffix: `.json` for `a.json.gz`."""
    path = PurePosixPath(name)
    if path.suffix.lower() in _COMPRESSIONS:
        path = PurePosixPath(path.stem)
    return path.suffix.lower()


def package_file(name: str) -> SourceFile:
    package, _, inner = name.partition("/")
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"Python package {package} is not installed; run `pip install {package}` or use "
            "another source"
        ) from error
    found = [
        file
        for file in files or ()
        if (str(file) == inner or (not inner and data_suffix(file.name) in _DATA_SUFFIXES))
        and not file.parts[0].endswith(".dist-info")
    ]
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise ConfigError(
            f"Python package {package} should have one data file ({', '.join(_DATA_SUFFIXES)}), "
            f"found {names}; select one with `package:{package}/PATH`"
        )
    path = Path(str(found[0].locate()))
    if not path.is_file():
        raise CorruptError(f"{path} is missing; reinstall {package}")
    return SourceFile(
        filesystem=fsspec.filesystem("file"), path=str(path), size=path.stat().st_size
    )


def files_of(source: str) -> list[SourceFile]:
    """Return the files at a path, a pattern or a URL; raise `ConfigError` if there are none."""
    with source_errors(source):
        filesystem, path = fsspec.core.url_to_fs(source)
        return _found(filesystem, path, source)


@contextmanager
def source_errors(where: str) -> Iterator[None]:
    """Turn whatever a file system raises into one of our errors, with its own words.

    A server that does not answer is a `TransientError`: Prefect would mistake a bare timeout for
    its own. A broken disk is a `DiskError`. All else is a `ConfigError`.
    """
    try:
        yield
    except EagleCoreError:
        raise
    except Exception as error:
        status = _http_status(error)
        words = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        if status is not None and 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY:
            raise ConfigError(
                f"{where}: the server refuses access with status {status} ({words}); "
                f"{_remedy(error)}"
            ) from error
        if status is not None or is_away(error):
            raise TransientError(
                f"{where}: the server does not answer ({words}); run again, or download the file "
                "and give its path"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE):
            raise DiskError(f"cannot read {where}: {words}; check the disk") from error
        raise ConfigError(f"cannot read {where}: {words}; {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install the package that it names, or download the file and give its path"
    if "gated" in str(error):
        return "accept its conditions on its page, and set HF_TOKEN to a token of that account"
    if isinstance(error, PermissionError):
        return "give this user access to it, or correct `source`"
    return "correct the address or the credentials, or download the file and give its path"


def _http_status(error: Exception) -> int | None:
    """Return the status that a server answered with: aiohttp's, or that of a hub's response."""
    answered = getattr(error, "response", None)
    for status in (getattr(error, "status", None), getattr(answered, "status_code", None)):
        if isinstance(status, int) and status >= 400:
            return status
    return None


def is_away(error: BaseException) -> bool:
    """Return whether a server did not answer, by the error of any client."""
    is_http = type(error).__module__.startswith("aiohttp")
    return is_http or any(kind.__name__ in _AWAY for kind in type(error).__mro__)


def _found(filesystem: fsspec.AbstractFileSystem, path: str, source: str) -> list[SourceFile]:
    is_pattern = glob.has_magic(path) and not filesystem.exists(path)
    if not is_pattern:
        paths = [path]
    elif isinstance(filesystem, LocalFileSystem):
        paths = sorted(set(_matching("/", path.strip("/").split("/"))))
    else:
        paths = sorted(filesystem.glob(path))
    files = [_file(filesystem, found, source, is_pattern=is_pattern) for found in paths]
    found_files = [file for file in files if file is not None]
    if not found_files:
        raise ConfigError(
            f"no file at {source}: expected JSON, JSON lines, Parquet, Arrow or CSV; correct "
            "`source`, or use `package:NAME` or `hf:ORG/NAME`"
        )
    return found_files


def _file(
    filesystem: fsspec.AbstractFileSystem, path: str, source: str, *, is_pattern: bool
) -> SourceFile | None:
    """Return one file; None if the path does not exist or a pattern matches a folder."""
    try:
        entry = filesystem.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not is_pattern:
            return None
        raise ConfigError(
            f"{path}, which matches {source}, does not exist (a dangling link?); restore or remove "
            "it, or correct `source`"
        ) from error
    if entry["type"] != "directory":
        return SourceFile(filesystem=filesystem, path=path, size=entry["size"])
    if is_pattern:
        return None
    raise ConfigError(
        f"{source} is a directory; select its files with a glob such as {source}/*.jsonl"
    )


def _matching(folder: str, pattern: Sequence[str]) -> Iterator[str]:
    """Yield the local paths below a folder that match a pattern, given as path parts.

    A matching folder that cannot be listed is an error; fsspec and Python's glob skip it.
    """
    part, *rest = pattern
    if part == "**":
        for below in _folders_below(folder):
            yield from _matching(below, rest or ["*"])
        return
    if glob.has_magic(part):
        names = [entry.name for entry in _entries(folder) if fnmatch.fnmatchcase(entry.name, part)]
    else:
        names = [part]
    for path in (Path(folder, name) for name in names):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not rest:
            yield str(path)
        elif path.is_dir():
            yield from _matching(str(path), rest)


def _folders_below(folder: str) -> Iterator[str]:
    """Yield a folder and all below it; links are not followed: one may lead back up."""
    yield folder
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _folders_below(entry.path)


def _entries(folder: str) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as listed:
            return list(listed)
    except FileNotFoundError:
        return []
