"""Sources of records: files at any place fsspec reaches, data files of packages, hub data sets.

A source is resolved once into what it is exactly (every file with size and digest, or a hub
commit) and is then streamed in constant memory. What is missing, empty or damaged is an error that
names it, never a shorter stream.
"""

import codecs
import fnmatch
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem

from eagle_core.data.config import DatasetConfig
from eagle_core.data.csv_records import read_csv
from eagle_core.data.hub import HubDataset, find_hub_dataset, read_hub_dataset
from eagle_core.data.json_records import JsonArrayReader, read_json_lines
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.errors import ConfigError, CorruptError, TransientError

_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv")
_COMPRESSIONS = (".gz", ".zst")
_BLOCK_BYTES = 8 << 20
_PARQUET_ROWS = 64
_AWAY = (TimeoutError, ConnectionError)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source."""

    filesystem: Any
    """An fsspec file system."""
    path: str
    size: int

    @property
    def name(self) -> str:
        """Last part of the path: what messages and the ledger call the file."""
        return PurePosixPath(self.path).name

    def digest(self) -> str:
        """Return xxh3_128 of a local file's bytes; elsewhere the file system's own checksum."""
        if not isinstance(self.filesystem, fsspec.get_filesystem_class("file")):
            with _server_errors(self.path):
                return f"checksum:{self.filesystem.checksum(self.path)}"
        digest = xxhash.xxh3_128()
        with self.filesystem.open(self.path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return f"xxh3_128:{digest.hexdigest()}"


def find_source(config: DatasetConfig) -> tuple[SourceFile, ...] | HubDataset:
    """Return what `config.source` stands for; raise `ConfigError` if nothing is there."""
    if config.source.startswith("hf:"):
        return find_hub_dataset(config)
    if config.revision is not None:
        raise ConfigError(
            f"data set {config.name}: `revision` is for hub data sets, but the source is "
            f"{config.source}; remove it or name a source `hf:ORG/NAME`"
        )
    if config.source.startswith("package:"):
        files = [_package_file(config.source.removeprefix("package:"))]
    else:
        files = _files(config.source)
    for file in files:
        if file.size == 0:
            raise CorruptError(f"{file.path} is empty (0 bytes); replace it and run again")
    return tuple(files)


def identify(source: tuple[SourceFile, ...] | HubDataset) -> tuple[dict[str, object], ...]:
    """Return, for every file, its name, size and digest; for a hub data set, its pinned commit."""
    if isinstance(source, HubDataset):
        return (source.identity(),)
    return tuple({"name": file.name, "size": file.size, "digest": file.digest()} for file in source)


def read_records(config: DatasetConfig) -> Iterator[SourceRecord | DamagedRecord]:
    """Yield the records of the source in order, in constant memory.

    Raises `ConfigError` for a source that is not there and `CorruptError` for one that is damaged,
    unless the configuration accepts the damage: then what is lost is yielded as `DamagedRecord`.
    """
    source = find_source(config)
    if isinstance(source, HubDataset):
        yield from read_hub_dataset(source)
        return
    total_bytes = sum(file.size for file in source)
    bytes_before = 0
    for file in source:
        yield from _read_file(file, config, _Progress(bytes_before, total_bytes))
        bytes_before += file.size


class _Progress:
    """How much of all files has been read, told by the position in the (compressed) file."""

    def __init__(self, bytes_before: int, total_bytes: int) -> None:
        self._bytes_before = bytes_before
        self._total_bytes = max(total_bytes, 1)
        self.position: Callable[[], int] = lambda: 0

    def __call__(self) -> float:
        return min((self._bytes_before + self.position()) / self._total_bytes, 1.0)


def _read_file(
    file: SourceFile, config: DatasetConfig, progress: _Progress
) -> Iterator[SourceRecord | DamagedRecord]:
    with _server_errors(file.path), file.filesystem.open(file.path, "rb") as raw:
        progress.position = raw.tell
        suffix = _suffix(file.name)
        if config.format == "parquet" or (config.format == "auto" and suffix == ".parquet"):
            yield from _read_parquet(raw, file, progress)
            return
        if config.format == "csv" or (config.format == "auto" and suffix == ".csv"):
            yield from read_csv(_decompressed(raw, file), path=file.path, fraction=progress)
            return
        stream = io.BufferedReader(_decompressed(raw, file), _BLOCK_BYTES)
        try:
            yield from _read_json(stream, file, config, progress)
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
            if _is_away(error):
                raise
            raise CorruptError(
                f"{file.path} cannot be read to its end: {error}; replace it and run again"
            ) from error


def _read_json(
    stream: "io.BufferedReader[io.RawIOBase]",
    file: SourceFile,
    config: DatasetConfig,
    progress: _Progress,
) -> Iterator[SourceRecord | DamagedRecord]:
    if config.format == "json" or (config.format == "auto" and _is_array(stream)):
        reader = JsonArrayReader(
            stream, path=file.path, fraction=progress, max_record_bytes=config.max_record_bytes
        )
        yield from reader.read(
            accept_truncated=config.accept_truncated, accept_damaged=config.accept_damaged
        )
        return
    yield from read_json_lines(
        stream,
        path=file.path,
        fraction=progress,
        max_record_bytes=config.max_record_bytes,
        accept_truncated=config.accept_truncated,
        accept_damaged=config.accept_damaged,
    )


def _read_parquet(
    stream: BinaryIO, file: SourceFile, progress: _Progress
) -> Iterator[SourceRecord]:
    row = 0
    try:
        for batch in pq.ParquetFile(stream).iter_batches(_PARQUET_ROWS):
            for value in batch.to_pylist():
                yield SourceRecord(
                    value=value, location=f"{file.name}, row {row}", fraction_read=progress()
                )
                row += 1
    except (pa.ArrowInvalid, OSError) as error:
        if _is_away(error):
            raise
        raise CorruptError(
            f"{file.path} is not a whole Parquet file ({row} rows could be read): {error}; "
            "replace it and run again"
        ) from error


def _decompressed(raw: BinaryIO, file: SourceFile) -> io.RawIOBase:
    compression = PurePosixPath(file.name).suffix.lower()
    if compression == ".gz":
        return cast("io.RawIOBase", gzip.GzipFile(fileobj=raw, mode="rb"))
    if compression == ".zst":
        return cast("io.RawIOBase", pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return cast("io.RawIOBase", raw)


def _suffix(name: str) -> str:
    """Return the suffix without that of a compression: `.json` for `a.json.gz`."""
    path = PurePosixPath(name)
    if path.suffix.lower() in _COMPRESSIONS:
        path = PurePosixPath(path.stem)
    return path.suffix.lower()


def _is_array(stream: "io.BufferedReader[io.RawIOBase]") -> bool:
    head: bytes = stream.peek(4096)
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _package_file(name: str) -> SourceFile:
    package, _, inner = name.partition("/")
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"Python package {package} is not installed; run `pip install {package}` or name "
            "another source"
        ) from error
    found = [
        file
        for file in files or ()
        if (str(file) == inner or (not inner and _suffix(file.name) in _DATA_SUFFIXES))
        and not file.parts[0].endswith(".dist-info")
    ]
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise ConfigError(
            f"Python package {package} should have one data file ({', '.join(_DATA_SUFFIXES)}), "
            f"found {names}; name it as `package:{package}/PATH`"
        )
    path = Path(str(found[0].locate()))
    if not path.is_file():
        raise CorruptError(f"{path} is missing; reinstall {package}")
    return SourceFile(
        filesystem=fsspec.filesystem("file"), path=str(path), size=path.stat().st_size
    )


def _files(source: str) -> list[SourceFile]:
    filesystem, path = fsspec.core.url_to_fs(source)
    try:
        with _server_errors(source):
            return _found(filesystem, path, source)
    except OSError as error:
        raise ConfigError(f"cannot read what {source} names: {error}") from error


@contextmanager
def _server_errors(where: str) -> Iterator[None]:
    """Say of a server that is away or slow that it may be back; Prefect takes a bare timeout for
    its own.
    """
    try:
        yield
    except Exception as error:
        status = getattr(error, "status", None)
        if _is_http(error) and isinstance(status, int) and 400 <= status < 500:
            raise ConfigError(
                f"{where}: the server refuses it with status {status} ({error}); correct the "
                "address or the credentials, or download the file and name its path"
            ) from error
        if not _is_away(error):
            raise
        raise TransientError(
            f"{where}: the server does not answer ({type(error).__name__}: {error}); run again, or "
            "download the file and name its path"
        ) from error


def _is_away(error: Exception) -> bool:
    return isinstance(error, _AWAY) or _is_http(error)


def _is_http(error: Exception) -> bool:
    return type(error).__module__.startswith("aiohttp")


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
            f"no file at {source}: expected JSON, JSON lines or Parquet; correct `source`, or use "
            "`package:NAME` or `hf:ORG/NAME`"
        )
    return found_files


def _file(
    filesystem: fsspec.AbstractFileSystem, path: str, source: str, *, is_pattern: bool
) -> SourceFile | None:
    """Return one file; None where a path leads nowhere, or a pattern to a folder."""
    try:
        entry = filesystem.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not is_pattern:
            return None
        raise ConfigError(
            f"{path}, which {source} names, is not there: a dangling link? Restore or remove it, "
            "or correct `source`"
        ) from error
    if entry["type"] != "directory":
        return SourceFile(filesystem=filesystem, path=path, size=entry["size"])
    if is_pattern:
        return None
    raise ConfigError(
        f"{source} is a directory; name its files with a glob such as {source}/*.jsonl"
    )


def _matching(folder: str, pattern: Sequence[str]) -> Iterator[str]:
    """Yield the paths on this disk that a pattern, in parts, names below a folder.

    A folder that it leads to and that cannot be listed is an error; fsspec and Python's own glob
    leave it out.
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
    """Yield a folder and all below it; links are not followed, for one may lead back up."""
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
