"""Records of Parquet files and of Arrow files (Feather, the cache of `datasets`), streamed."""

import io
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_core.data.files.source_file import SourceFile
from eagle_core.data.files.streams import GuardedFile
from eagle_core.data.source_record import SourceRecord
from eagle_core.errors import CorruptError

_ROWS = 64
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
PARQUET, ARROW_FILE, ARROW_STREAM = "Parquet", "Arrow", "Arrow stream"
_MAGIC = {b"PAR1": PARQUET, b"ARROW1\x00\x00": ARROW_FILE, b"\xff\xff\xff\xff": ARROW_STREAM}
"""A stream begins with the mark of a message, then with its size."""


def columnar_kind(head: bytes) -> str | None:
    """Return which of the three kinds begins with these bytes; None for anything else."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def read_columnar(
    stream: GuardedFile, file: SourceFile, kind: str, fraction: Callable[[], float]
) -> Iterator[SourceRecord]:
    """Yield one mapping per row; raise `CorruptError` for a damaged or incomplete file."""
    row = 0
    try:
        for batch in _batches(stream, kind):
            for value in batch.to_pylist():
                yield SourceRecord(
                    value=value, location=f"{file.name}, row {row}", fraction_read=fraction()
                )
                row += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise CorruptError(
            f"{file.path} is not a complete {kind} file ({row} rows could be read): {error}; "
            "replace it and run again"
        ) from error


def _batches(stream: GuardedFile, kind: str) -> Iterator[pa.RecordBatch]:
    """Yield a few rows at a time: a batch in an Arrow file may be a whole data set."""
    if kind == PARQUET:
        yield from pq.ParquetFile(cast("BinaryIO", stream)).iter_batches(_ROWS)
        return
    stored: Iterable[pa.RecordBatch]
    if kind == ARROW_STREAM:
        _check_end(stream)
        stored = pa.ipc.open_stream(stream)
    else:
        reader = pa.ipc.open_file(stream)
        stored = (reader.get_batch(index) for index in range(reader.num_record_batches))
    for batch in stored:
        for first in range(0, batch.num_rows, _ROWS):
            yield batch.slice(first, _ROWS)


def _check_end(stream: GuardedFile) -> None:
    """Raise unless a stream has its end mark: pyarrow takes one that is cut for a shorter one."""
    stream.seek(-len(_END_OF_STREAM), io.SEEK_END)
    if stream.read() != _END_OF_STREAM:
        raise pa.ArrowInvalid("it has no end mark, so it is truncated")
    stream.seek(0)
