"""Writes rows to a Parquet file that appears, whole and synced, when all of them are in."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_core.atomic_files import atomic_file

_ROWS_PER_GROUP = 1024


class RowWriter:
    """A context: the file is moved into place when it is left without an error."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._rows: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        """Take rows from here on."""
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
        """Finish the file, or remove what was written if there was an error."""
        if kind is None:
            with self._stack:
                self._flush()
        else:
            self._stack.__exit__(kind, error, traceback)

    def add(self, row: dict[str, object]) -> None:
        """Take one row; a row group is in memory at a time."""
        self._rows.append(row)
        if len(self._rows) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []
