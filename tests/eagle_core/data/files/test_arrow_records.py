"""Columns of Parquet and Arrow files whose values Python has no equal for."""

from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.data.source_record import SourceRecord
from eagle_core.data.sources import read_records
from eagle_core.errors import CorruptError

LATE = 10**15


def values(table: pa.Table, path: Path) -> list[object]:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pa.feather.write_feather(table, str(path))
    config = DatasetConfig.model_validate({"name": "d", "source": str(path)})
    return [record.value for record in read_records(config) if isinstance(record, SourceRecord)]


@pytest.fixture(params=["a.parquet", "a.arrow"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def with_questions(column: pa.Array) -> pa.Table:
    return pa.table({"question": [f"q{at}" for at in range(len(column))], "c": column})


TEXTS = pa.map_(pa.string(), pa.string())


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        (TEXTS, [[("a", "x"), ("b", None)], [], None], [{"a": "x", "b": None}, {}, None]),
        (pa.list_(TEXTS), [[[("role", "user")]]], [[{"role": "user"}]]),
        (
            pa.struct([("args", TEXTS)]),
            [{"args": [("city", "Rome")]}],
            [{"args": {"city": "Rome"}}],
        ),
        (pa.map_(pa.string(), TEXTS), [[("a", [("b", "x")])]], [{"a": {"b": "x"}}]),
    ],
)
def test_maps_are_objects(
    path: Path, kind: pa.DataType, found: list[object], expected: list[object]
) -> None:
    read = values(with_questions(pa.array(found, kind)), path)
    assert read == [{"question": f"q{at}", "c": value} for at, value in enumerate(expected)]


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (pa.timestamp("ms"), 10**15),
        (pa.timestamp("us", "UTC"), 10**18),
        (pa.timestamp("us", "Mars/Olympus"), 1),
        (pa.duration("s"), 10**15),
        (pa.date32(), 10**9),
    ],
)
def test_a_time_that_python_cannot_express_is_a_number(
    path: Path, kind: pa.DataType, number: int
) -> None:
    times = pa.array([number, None], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    assert values(with_questions(times), path) == [
        {"question": "q0", "c": number},
        {"question": "q1", "c": None},
    ]
    for nested, expected in (
        (pa.StructArray.from_arrays([times], ["at"]), {"at": number}),
        (pa.ListArray.from_arrays([0, 1, 2], times), [number]),
        (pa.FixedSizeListArray.from_arrays(times, 1), [number]),
        (pa.MapArray.from_arrays([0, 1, 2], pa.array(["a", "b"]), times), {"a": number}),
    ):
        assert values(with_questions(nested), path)[0] == {"question": "q0", "c": expected}


def test_usual_times_are_times(path: Path) -> None:
    times = pa.array([0, 86_400], pa.timestamp("s"))
    assert values(with_questions(times), path) == with_questions(times).to_pylist()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([b"ok", b"\xff"]).cast(pa.binary()).view(pa.string()), "'utf-8' codec"),
        (pa.array([[("a", "x"), ("a", "y")]], TEXTS), "duplicate keys"),
        (
            pa.array([[({"a": 1}, 1)]], pa.map_(pa.struct([("a", pa.int64())]), pa.int64())),
            "unhashable",
        ),
    ],
    ids=["not UTF-8", "a key twice", "objects as keys"],
)
def test_what_has_no_value_is_named_with_its_column(
    path: Path, column: pa.Array, message: str
) -> None:
    with pytest.raises(CorruptError, match=f"{path.name}, column 'c', rows from 0 on.*{message}"):
        values(with_questions(column), path)


def test_two_columns_of_one_name_are_refused_by_name(path: Path) -> None:
    table = pa.table([pa.array(["q"]), pa.array(["a"]), pa.array(["b"])], ["q", "answer", "answer"])
    with pytest.raises(CorruptError, match=f"{path.name} has two columns named 'answer'; rename"):
        values(table, path)
