"""Sources of records: files at any fsspec location, data files of packages, hub data sets.

A source is resolved once to its exact identity (every file with size and digest, or a hub commit)
and then streamed in constant memory. A missing, empty or damaged file raises an error that names
it; the stream is never silently shorter.
"""

import codecs
import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence

from eagle_core.data.config import DatasetConfig
from eagle_core.data.files.arrow_records import columnar_kind, read_columnar
from eagle_core.data.files.csv_records import read_csv
from eagle_core.data.files.foreign import refuse_foreign
from eagle_core.data.files.json_lines import read_json_lines
from eagle_core.data.files.json_records import JsonReader
from eagle_core.data.files.json_shape import list_of_records, spans_lines
from eagle_core.data.files.source_file import (
    BLOCK_BYTES,
    SourceFile,
    data_suffix,
    files_of,
    package_file,
    source_errors,
)
from eagle_core.data.files.streams import (
    DECOMPRESSION_ERRORS,
    HEAD_BYTES,
    GuardedFile,
    ReplayedStream,
    as_utf8,
    decompressed,
    read_head,
)
from eagle_core.data.hub.dataset import (
    FILES_OF_HUB,
    HubDataset,
    find_hub_dataset,
    find_hub_files,
    read_hub_dataset,
)
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.errors import ConfigError, CorruptError

_TABLES = (".csv", ".tsv")
_JSON_START = re.compile(rb'[{\["0-9]|-[0-9]|(true|false|null)\b')


def find_source(config: DatasetConfig) -> tuple[SourceFile, ...] | HubDataset:
    """Resolve `config.source`; raise `ConfigError` if nothing is found."""
    if config.source.startswith(FILES_OF_HUB):
        _refuse_keys(config, ("subsets", "split"), "data sets of the hub, not for its files")
        return tuple(_not_empty(find_hub_files(config)))
    if config.source.startswith("hf:"):
        return find_hub_dataset(config)
    _refuse_keys(config, ("revision", "streaming", "subsets", "split"), "hub data sets")
    if config.source.startswith("package:"):
        files = [package_file(config.source.removeprefix("package:"))]
    else:
        files = files_of(config.source)
    return tuple(_not_empty(files))


def _refuse_keys(config: DatasetConfig, keys: Sequence[str], belongs_to: str) -> None:
    """Raise `ConfigError` for a key that would change nothing, unless it has its default."""
    for key in keys:
        if getattr(config, key) != type(config).model_fields[key].default:
            raise ConfigError(
                f"data set {config.name}: `{key}` is for {belongs_to}, but the source is "
                f"{config.source}; remove it or use a source `hf:ORG/NAME`"
            )


def _not_empty(files: list[SourceFile]) -> list[SourceFile]:
    for file in files:
        if file.size == 0:
            raise CorruptError(f"{file.path} is empty (0 bytes); replace it and run again")
    return files


def identify(source: tuple[SourceFile, ...] | HubDataset) -> tuple[dict[str, object], ...]:
    """Return, for every file, its name, size and digest; for a hub data set, its pinned commit."""
    if isinstance(source, HubDataset):
        return (source.identity(),)
    return tuple(file.identity() for file in source)


def source_identity(config: DatasetConfig) -> tuple[dict[str, object], ...]:
    """Return `identify` of the source of a data set, or of all of its sources, by their names."""
    if not config.sources:
        return identify(find_source(config))
    return tuple(
        {"of": part.name, **entry} for part in config.parts for entry in identify(find_source(part))
    )


def read_records(config: DatasetConfig) -> Iterator[SourceRecord | DamagedRecord]:
    """Yield the records of the only source in order, in constant memory.

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
    with contextlib.ExitStack() as stack:
        with source_errors(file.path):
            raw = stack.enter_context(file.filesystem.open(file.path, "rb"))
        stream = GuardedFile(raw, file.path)
        progress.position = raw.tell
        head = read_head(stream)
        kind = columnar_kind(head)
        if kind is not None:
            _check_format(file, config, kind)
            stream.seek(0)
            yield from read_columnar(stream, file, kind, progress)
            return
        try:
            yield from _read_text(decompressed(stream, head), file, config, progress)
        except DECOMPRESSION_ERRORS as error:
            raise CorruptError(
                f"{file.path} cannot be read to its end: {error or type(error).__name__}; replace "
                "it and run again"
            ) from error
        except UnicodeDecodeError as error:
            raise CorruptError(
                f"{file.path} is not valid {error.encoding}: {error.reason}; replace it and run "
                "again"
            ) from error


def _read_text(
    stream: io.RawIOBase, file: SourceFile, config: DatasetConfig, progress: _Progress
) -> Iterator[SourceRecord | DamagedRecord]:
    """Yield the records of a decompressed file."""
    head = read_head(stream)
    if (kind := columnar_kind(head)) is not None:
        raise CorruptError(f"{file.path} is a compressed {kind} file; decompress it and run again")
    refuse_foreign(head, file.path)
    utf8 = io.BufferedReader(as_utf8(stream, head), BLOCK_BYTES)
    is_whole = len(head) < HEAD_BYTES
    start = utf8.peek(HEAD_BYTES)
    if is_whole and not start.removeprefix(codecs.BOM_UTF8).strip():
        raise CorruptError(f"{file.path} is empty; replace it and run again")
    suffix = data_suffix(file.name)
    if config.format == "parquet" or (config.format == "auto" and suffix == ".parquet"):
        raise CorruptError(
            f"{file.path} is not a complete Parquet file (it starts with {start[:4]!a}); replace "
            "it and run again"
        )
    if config.format == "csv" or (config.format == "auto" and suffix in _TABLES):
        yield from read_csv(utf8, path=file.path, fraction=progress)
        return
    yield from _read_json(utf8, file, config, progress, is_whole=is_whole)


def _read_json(
    stream: "io.BufferedReader[io.RawIOBase]",
    file: SourceFile,
    config: DatasetConfig,
    progress: _Progress,
    *,
    is_whole: bool,
) -> Iterator[SourceRecord | DamagedRecord]:
    is_one_text = config.format == "json"
    if config.format == "auto":
        is_one_text, stream = _is_one_text(stream, config, is_whole=is_whole)
    if is_one_text:
        reader = JsonReader(
            stream,
            path=file.path,
            fraction=progress,
            max_record_bytes=config.max_record_bytes,
            columns=config.columns,
        )
        yield from reader.read(
            accept_truncated=config.accept_truncated, accept_damaged=config.accept_damaged
        )
        return
    if not config.accept_damaged:
        _check_json(stream, file)
    yield from read_json_lines(
        stream,
        path=file.path,
        fraction=progress,
        max_record_bytes=config.max_record_bytes,
        accept_truncated=config.accept_truncated,
        accept_damaged=config.accept_damaged,
    )


def _is_one_text(
    stream: "io.BufferedReader[io.RawIOBase]", config: DatasetConfig, *, is_whole: bool
) -> "tuple[bool, io.BufferedReader[io.RawIOBase]]":
    """Return whether a file is JSON of another form than one record on each line, and the stream.

    `is_whole` says that `peek` returns all of it. A line that is longer, and may be a record or
    wrap a list of them, is read to its end.
    """
    text = _as_text(stream.peek(HEAD_BYTES))
    if text.startswith("["):
        return True, stream
    columns = config.columns
    may_wrap = not is_whole and "\n" not in text
    if may_wrap and list_of_records(text, columns=columns) is not None:
        line = stream.readline(config.max_record_bytes)
        behind = stream.peek(HEAD_BYTES)
        stream = io.BufferedReader(ReplayedStream(line, stream.read), BLOCK_BYTES)
        text, is_whole = _as_text(line + behind), not behind
    return text.startswith("{") and spans_lines(text, is_whole=is_whole, columns=columns), stream


def _as_text(start: bytes) -> str:
    return start.decode("utf-8-sig", "surrogateescape").lstrip()


def read_strictly(name: str, source: str) -> Iterator[SourceRecord | DamagedRecord]:
    """Yield every record of files that have no settings by which damage could be accepted.

    Damage is yielded, for the caller to refuse: an error would advise settings of a data set.
    """
    config = DatasetConfig(name=name, source=source, accept_truncated=True, accept_damaged=True)
    return read_records(config)


def _check_json(stream: "io.BufferedReader[io.RawIOBase]", file: SourceFile) -> None:
    """Raise `CorruptError` if the file does not even start like JSON."""
    start = stream.peek(HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:40]
    if not start or _JSON_START.match(start):
        return
    if b"\0" in start:
        raise CorruptError(
            f"{file.path} is binary data of an unknown form (it starts with {start!a}); "
            "replace it, or write its records as JSON lines or Parquet, then run again"
        )
    line = start.decode("utf-8", "replace").splitlines()[0]
    raise CorruptError(
        f"{file.path} is not JSON (it starts with {line!a}); for a table with a header line, set "
        "dataset.format=csv; otherwise write its records as JSON lines, then run again"
    )


def _check_format(file: SourceFile, config: DatasetConfig, kind: str) -> None:
    if config.format not in ("auto", kind.lower()):
        raise ConfigError(
            f"{file.path} has the form {kind}, but dataset.format is {config.format}; remove "
            "`format` and run again"
        )
