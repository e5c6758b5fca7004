"""Write rows to a Parquet file that appears, complete and synced, after the last row."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_core.atomic_files import atomic_file

_ROWS_PER_GROUP = 1024
_BYTES_PER_GROUP = 128 << 20
_ENTRY_BYTES = 32
"""Of a number in a list, such as a token id: it is an object of its own in Python."""


class RowWriter:
    """Context manager: the file is moved into place if the block ends without an error."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._rows: list[dict[str, object]] = []
        self._num_bytes = 0

    def __enter__(self) -> Self:
        """Open the file for rows."""
        with ExitStack() as stack:
            partial = stack.enter_context(atomic_file(self._path))
            writer = pq.ParquetWriter(partial, self._schema, compression="zstd")
            self._writer = stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Complete the file, or remove the partial file after an error."""
        if kind is None:
            with self._stack:
                self._flush()
        else:
            self._stack.__exit__(kind, error, traceback)

    def add(self, row: dict[str, object]) -> None:
        """Add one row; one row group is in memory at a time."""
        self._rows.append(row)
        self._num_bytes += _num_bytes(row)
        if len(self._rows) >= _ROWS_PER_GROUP or self._num_bytes >= _BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []
            self._num_bytes = 0


def _num_bytes(value: object) -> int:
    """Return about how much memory a value of a row takes."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    if not isinstance(value, list | tuple):
        return _ENTRY_BYTES
    is_flat = not value or isinstance(value[0], int)
    return len(value) * _ENTRY_BYTES if is_flat else sum(map(_num_bytes, value))
