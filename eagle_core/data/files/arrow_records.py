"""Records of Parquet files and of Arrow files (Feather, the cache of `datasets`), streamed."""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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

_NO_VALUE = (ValueError, OverflowError, LookupError, TypeError)
"""What pyarrow raises for text that is not UTF-8, times beyond the year 9999, unknown time zones,
and for maps with a key twice or with objects as keys."""


def columnar_kind(head: bytes) -> str | None:
    """Return which of the three kinds begins with these bytes; None for anything else."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def read_columnar(
    stream: GuardedFile, file: SourceFile, kind: str, fraction: Callable[[], float]
) -> Iterator[SourceRecord]:
    """Yield one mapping per row; raise `CorruptError` for a damaged or incomplete file.

    Maps become objects. A time that Python cannot express becomes its number of units.
    """
    row = 0
    try:
        for batch in _batches(stream, kind):
            _check_names(batch.schema.names, file)
            for value in _rows(batch, file, row):
                yield SourceRecord(
                    value=value, location=f"{file.name}, row {row}", fraction_read=fraction()
                )
                row += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise CorruptError(
            f"{file.path} is not a complete {kind} file ({row} rows could be read): {error}; "
            "replace it and run again"
        ) from error


def _check_names(names: Sequence[str], file: SourceFile) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CorruptError(
            f"{file.path} has two columns named {twice[0]!a}; rename or remove one, then run again"
        )


def _rows(batch: pa.RecordBatch, file: SourceFile, first_row: int) -> list[dict[str, object]]:
    columns = {
        name: _values(column, f"{file.path}, column {name!a}, rows from {first_row} on")
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    return [
        {name: column[index] for name, column in columns.items()} for index in range(batch.num_rows)
    ]


def _values(column: pa.Array, place: str) -> list[object]:
    """Return the values of a column; raise `CorruptError` naming the place of what has none."""
    try:
        return _as_python(column)
    except _NO_VALUE as error:
        found = error
    try:
        return _as_python(column.cast(_without_times(column.type)))
    except (*_NO_VALUE, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise CorruptError(
            f"{place}: {column.type} has a value that cannot be read ({found}); remove the column "
            "or write it anew, then run again"
        ) from found


def _as_python(column: pa.Array) -> list[object]:
    return cast("list[object]", column.to_pylist(maps_as_pydicts="strict"))


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Return a type with the numbers that stand for times, dates and durations."""
    types = pa.types
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pa.int64()
    if types.is_dictionary(kind):
        return _without_times(kind.value_type)
    return _without_times_within(kind) if types.is_nested(kind) else kind


def _without_times_within(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_struct(kind):
        return pa.struct([_field_without_times(kind.field(at)) for at in range(kind.num_fields)])
    if types.is_map(kind):
        return pa.map_(_without_times(kind.key_type), _without_times(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_field_without_times(kind.value_field), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_field_without_times(kind.value_field))
    return pa.list_(_field_without_times(kind.value_field)) if types.is_list(kind) else kind


def _field_without_times(field: pa.Field) -> pa.Field:
    return field.with_type(_without_times(field.type))


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
