"""The columns of a table."""

from pathlib import Path

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.data.source_record import SourceRecord
from eagle_core.data.sources import read_records
from eagle_core.errors import CorruptError


def values(path: Path, text: str) -> list[object]:
    path.write_text(text, encoding="utf-8")
    config = DatasetConfig.model_validate({"name": "d", "source": str(path)})
    return [record.value for record in read_records(config) if isinstance(record, SourceRecord)]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("question,answer,answer", "answer"),
        ("question;question;answer", "question"),
        ('"a b"\tc\t"a b"', "a b"),
        ("\ufeffid,question,id", "id"),
    ],
)
def test_two_columns_of_one_name_are_refused_by_name(
    tmp_path: Path, header: str, name: str
) -> None:
    with pytest.raises(CorruptError, match=rf"a\.csv has two columns named '{name}'; rename"):
        values(tmp_path / "a.csv", header + "\n")


def test_columns_without_a_name_lose_nothing(tmp_path: Path) -> None:
    assert values(tmp_path / "a.csv", "question,,\nq,x,y\n") == [
        {"question": "q", "column 2": "x", "column 3": "y"}
    ]
    assert values(tmp_path / "a.csv", ",question\n0,q\n") == [{"": "0", "question": "q"}]
