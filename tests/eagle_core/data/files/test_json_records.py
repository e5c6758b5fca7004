"""Streaming JSON: every cut, every broken byte and every offset."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_core.data.files import json_records
from eagle_core.data.files.json_lines import read_json_lines
from eagle_core.data.files.json_records import JsonReader
from eagle_core.data.ledger import Reason
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.errors import CorruptError

Found = list[SourceRecord | DamagedRecord]


def read_array(
    data: bytes, *, limit: int = 1 << 20, truncated: bool = False, damaged: bool = False
) -> Found:
    reader = JsonReader(
        io.BytesIO(data), path="dir/a.json", fraction=lambda: 0.5, max_record_bytes=limit
    )
    return list(reader.read(accept_truncated=truncated, accept_damaged=damaged))


def read_lines(
    data: bytes, *, limit: int = 1 << 20, truncated: bool = False, damaged: bool = False
) -> Found:
    return list(
        read_json_lines(
            io.BytesIO(data),
            path="dir/a.jsonl",
            fraction=lambda: 0.5,
            max_record_bytes=limit,
            accept_truncated=truncated,
            accept_damaged=damaged,
        )
    )


def values(found: Found) -> list[object]:
    return [record.value for record in found if isinstance(record, SourceRecord)]


RECORDS: list[object] = [{"id": 1, "t": 'é😀 "]}{['}, {"id": 2, "t": ["\n", None, -1.5e3]}, {}]


@pytest.fixture(params=[1, 3, 7, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read in tiny pieces, so that borders fall inside records, literals and characters."""
    monkeypatch.setattr(json_records, "_CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_is_read_whole(indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only)
    assert values(read_array(text.encode())) == RECORDS
    assert values(read_array(b"\xef\xbb\xbf \n" + text.encode() + b"\n")) == RECORDS


def test_locations_are_byte_offsets() -> None:
    data = json.dumps(RECORDS, ensure_ascii=False).encode()
    for index, record in enumerate(read_array(data)):
        offset = int(record.location.rpartition(" ")[2])
        assert record.location.startswith(f"a.json, record {index} at byte ")
        assert (
            json.loads(
                data[offset:].decode().partition(json.dumps(RECORDS[index], ensure_ascii=False))[1]
            )
            == RECORDS[index]
        )


@pytest.mark.usefixtures("chunk_bytes")
def test_every_cut_is_found_and_loses_no_whole_record() -> None:
    data = json.dumps(RECORDS, ensure_ascii=False).encode()
    ends = [data.index(b'"id": 2') - 3, data.index(b"{}") - 2, data.index(b"{}") + 2]
    for cut in range(1, len(data)):
        with pytest.raises(CorruptError, match="accept_truncated"):
            read_array(data[:cut])
        found = read_array(data[:cut], truncated=True)
        assert values(found) == RECORDS[: sum(end <= cut for end in ends)]
        assert isinstance(found[-1], DamagedRecord)
        assert found[-1].reason is Reason.TRUNCATED


def test_a_cut_names_file_offset_and_whole_records() -> None:
    with pytest.raises(CorruptError) as caught:
        read_array(b'[{"a": 1}, {"b": "unfinis')
    assert "dir/a.json" in str(caught.value)
    assert "byte 11, 1 whole records before it" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b'[{"a": 1} {"b": 2}, {"c": 3}]',
        b'[{"a": 1},, {"b": 2}, {"c": 333333333333333333}]',
        b"[{'a': 1}, {'b': 22222222222222222222222}]",
        b'[{"a": 1}] trailing',
        b'{"a": 1}, {"b": 2}',
        b"",
        b"[" * 100_000,
    ],
)
def test_what_is_not_json_is_never_accepted(data: bytes) -> None:
    with pytest.raises(CorruptError, match="byte"):
        read_array(data, truncated=bool(data) and data[:2] != b"[[", damaged=True)


@pytest.mark.usefixtures("chunk_bytes")
def test_broken_utf8_costs_one_record() -> None:
    data = b'[{"a": "x"}, {"a": "\xff\xc3"}, {"a": "\xc3\xa9"}]'
    with pytest.raises(CorruptError, match=r"byte 20, 1 whole records.*accept_damaged"):
        read_array(data)
    found = read_array(data, damaged=True)
    assert values(found) == [{"a": "x"}, {"a": "é"}]
    assert isinstance(found[1], DamagedRecord)
    assert found[1].reason is Reason.BROKEN_UTF8


def test_a_giant_record_is_left_out() -> None:
    data = json.dumps([{"a": "x" * 100}, {"a": "y"}]).encode()
    found = read_array(data, limit=50)
    assert values(found) == [{"a": "y"}]
    assert isinstance(found[0], DamagedRecord)
    assert found[0].reason is Reason.TOO_LARGE


def test_lines_are_read_and_blank_ones_skipped() -> None:
    data = b'\n{"a": 1}\r\n\n{"a": "\xc3\xa9"}'
    found = read_lines(data)
    assert values(found) == [{"a": 1}, {"a": "é"}]
    assert [record.location for record in found] == [
        "a.jsonl, record 0 at byte 1", "a.jsonl, record 1 at byte 12",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "reason", "option"),
    [
        (b'{"a": \n', Reason.BROKEN_JSON, "accept_damaged"),
        (b'{"a": "\xff"}\n', Reason.BROKEN_UTF8, "accept_damaged"),
        (b"[" * 100_000 + b"\n", Reason.BROKEN_JSON, "accept_damaged"),
    ],
)
def test_a_damaged_line_costs_one_record(line: bytes, reason: Reason, option: str) -> None:
    data = b'{"a": 1}\n' + line + b'{"a": 2}\n'
    with pytest.raises(CorruptError, match=f"byte 9, 1 whole records.*{option}"):
        read_lines(data, truncated=True)
    found = read_lines(data, damaged=True)
    assert values(found) == [{"a": 1}, {"a": 2}]
    assert isinstance(found[1], DamagedRecord)
    assert found[1].reason is reason


def test_a_cut_last_line_is_a_truncation() -> None:
    data = b'{"a": 1}\n{"a": 22'
    with pytest.raises(CorruptError, match="accept_truncated"):
        read_lines(data, damaged=True)
    found = read_lines(data, truncated=True)
    assert values(found) == [{"a": 1}]
    assert isinstance(found[1], DamagedRecord)
    assert found[1].reason is Reason.TRUNCATED


@pytest.mark.parametrize("size", [51, 99, 100, 101, 102, 103, 500])
def test_a_giant_line_is_left_out_whatever_its_length(size: int) -> None:
    data = b'{"a": 1}\n"' + b"x" * size + b'"\n{"a": 2}\n'
    found = read_lines(data, limit=50)
    assert values(found) == [{"a": 1}, {"a": 2}]
    assert found[-1].location == f"a.jsonl, record 2 at byte {9 + size + 3}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet=st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(JSON, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_any_array_comes_back(records: list[object], indent: int | None, ascii_only: bool) -> None:
    data = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()
    assert values(read_array(data)) == records
