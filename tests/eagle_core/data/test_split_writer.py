"""Conversations come back from their table, however long they are, in little memory."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_core.data import row_writer, split_writer
from eagle_core.data.conversation_table import CONVERSATION_SCHEMA
from eagle_core.data.row_writer import RowWriter
from eagle_core.data.split_writer import read_rows

NUM_IDS = 1000
_ROW_BYTES = 36 * NUM_IDS
"""Of the ids of one row, as Python objects."""


def row(number: int, num_ids: int) -> dict[str, object]:
    ids = [1000 + (number * 7919 + at * 104_729) % 100_000 for at in range(num_ids)]
    return {
        **dict.fromkeys(CONVERSATION_SCHEMA.names),
        "conversation_id": str(number),
        "messages": [],
        "input_ids": ids,
        "loss_mask": [True] * num_ids,
    }


def peak_of(path: Path, expected: int) -> int:
    """Read the table and return the most bytes that Python had taken meanwhile."""
    tracemalloc.start()
    try:
        names = [found["conversation_id"] for found in read_rows(path)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert names == [str(number) for number in range(expected)]
    return peak


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_writer, "_BYTES_PER_GROUP", 10 * 64 * NUM_IDS)
    monkeypatch.setattr(split_writer, "_BYTES_PER_BATCH", 10 * 4 * NUM_IDS)


def test_long_rows_are_read_as_few_at_a_time_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    with RowWriter(path, CONVERSATION_SCHEMA) as rows:
        for number in range(300):
            rows.add(row(number, NUM_IDS))
    assert pq.read_metadata(path).num_row_groups == 30
    assert peak_of(path, 300) < 40 * _ROW_BYTES


def test_long_rows_of_an_earlier_version_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    """It wrote 1,024 rows to a group, whatever their size."""
    path = tmp_path / "train.parquet"
    rows = [row(number, NUM_IDS) for number in range(300)]
    pq.write_table(pa.Table.from_pylist(rows, schema=CONVERSATION_SCHEMA), path)
    del rows
    assert pq.read_metadata(path).num_row_groups == 1
    assert peak_of(path, 300) < 40 * _ROW_BYTES


@pytest.mark.parametrize("num_ids", [0, 1, 100 * NUM_IDS])
def test_a_row_of_any_size_is_read(tmp_path: Path, num_ids: int) -> None:
    path = tmp_path / "train.parquet"
    with RowWriter(path, CONVERSATION_SCHEMA) as rows:
        for number in range(3):
            rows.add(row(number, num_ids))
    assert [found["input_ids"] for found in read_rows(path)] == [
        row(number, num_ids)["input_ids"] for number in range(3)
    ]


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "held_out.parquet", CONVERSATION_SCHEMA):
        pass
    assert list(read_rows(tmp_path / "held_out.parquet")) == []
