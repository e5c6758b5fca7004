"""Sources of records: files at any fsspec location, data files of packages, hub data sets.

A source is resolved once to its exact identity (every file with size and digest, or a hub commit)
and then streamed in constant memory. A missing, empty or damaged file raises an error that names
it; the stream is never silently shorter.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_core.data.config import DatasetConfig
from eagle_core.data.csv_records import read_csv
from eagle_core.data.hub import HubDataset, find_hub_dataset, read_hub_dataset
from eagle_core.data.json_records import JsonArrayReader, read_json_lines
from eagle_core.data.source_files import (
    BLOCK_BYTES,
    SourceFile,
    data_suffix,
    files_of,
    is_away,
    package_file,
    server_errors,
)
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.errors import ConfigError, CorruptError

_PARQUET_ROWS = 64


def find_source(config: DatasetConfig) -> tuple[SourceFile, ...] | HubDataset:
    """Resolve `config.source`; raise `ConfigError` if nothing is found."""
    if config.source.startswith("hf:"):
        return find_hub_dataset(config)
    if config.revision is not None:
        raise ConfigError(
            f"data set {config.name}: `revision` is for hub data sets, but the source is "
            f"{config.source}; remove it or use a source `hf:ORG/NAME`"
        )
    if config.source.startswith("package:"):
        files = [package_file(config.source.removeprefix("package:"))]
    else:
        files = files_of(config.source)
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

    Raises `ConfigError` for a missing source and `CorruptError` for a damaged one, unless the
    configuration accepts the damage: then lost records are yielded as `DamagedRecord`.
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
    """Fraction of all files read so far, by the position in the (compressed) file."""

    def __init__(self, bytes_before: int, total_bytes: int) -> None:
        self._bytes_before = bytes_before
        self._total_bytes = max(total_bytes, 1)
        self.position: Callable[[], int] = lambda: 0

    def __call__(self) -> float:
        return min((self._bytes_before + self.position()) / self._total_bytes, 1.0)


def _read_file(
    file: SourceFile, config: DatasetConfig, progress: _Progress
) -> Iterator[SourceRecord | DamagedRecord]:
    with server_errors(file.path), file.filesystem.open(file.path, "rb") as raw:
        progress.position = raw.tell
        suffix = data_suffix(file.name)
        if config.format == "parquet" or (config.format == "auto" and suffix == ".parquet"):
            yield from _read_parquet(raw, file, progress)
            return
        if config.format == "csv" or (config.format == "auto" and suffix == ".csv"):
            yield from read_csv(_decompressed(raw, file), path=file.path, fraction=progress)
            return
        stream = io.BufferedReader(_decompressed(raw, file), BLOCK_BYTES)
        try:
            yield from _read_json(stream, file, config, progress)
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
            if is_away(error):
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
        if is_away(error):
            raise
        raise CorruptError(
            f"{file.path} is not a complete Parquet file ({row} rows could be read): {error}; "
            "replace it and run again"
        ) from error


def _decompressed(raw: BinaryIO, file: SourceFile) -> io.RawIOBase:
    compression = PurePosixPath(file.name).suffix.lower()
    if compression == ".gz":
        return cast("io.RawIOBase", gzip.GzipFile(fileobj=raw, mode="rb"))
    if compression == ".zst":
        return cast("io.RawIOBase", pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return cast("io.RawIOBase", raw)


def _is_array(stream: "io.BufferedReader[io.RawIOBase]") -> bool:
    head: bytes = stream.peek(4096)
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
