"""Rows of any size in groups that fit in memory."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_core.data import row_writer
from eagle_core.data.row_writer import RowWriter

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("turns", pa.list_(pa.struct([("content", pa.string())]))),
    ]
)
TEXT = "x" * 32_000


@pytest.mark.parametrize(
    ("large", "expected"),
    [
        ({"text": TEXT}, [4, 4, 1]),
        ({"ids": (1,) * 1000}, [4, 4, 1]),
        ({"turns": [{"content": TEXT}, {"content": TEXT}]}, [2, 2, 2, 2, 1]),
        ({"text": "x"}, [9]),
    ],
)
def test_a_group_of_large_rows_has_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: dict[str, object], expected: list[int]
) -> None:
    monkeypatch.setattr(row_writer, "_BYTES_PER_GROUP", 128_000)
    row = {"text": None, "ids": None, "turns": None, **large}
    with RowWriter(tmp_path / "a.parquet", SCHEMA) as rows:
        for _ in range(9):
            rows.add(dict(row))
    with pq.ParquetFile(tmp_path / "a.parquet") as table:
        metadata = table.metadata
        assert [
            metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)
        ] == expected
        assert table.read().num_rows == sum(expected)
