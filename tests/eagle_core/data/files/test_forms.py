"""Forms of files: the first bytes tell what one is, whatever its name."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.data.files.streams import HEAD_BYTES
from eagle_core.data.ledger import Reason
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.data.sources import read_records
from eagle_core.errors import ConfigError, CorruptError

RECORDS: list[object] = [
    {"id": str(number), "messages": [{"role": "user", "content": "é😀" * number}]}
    for number in range(5)
]
LARGE: list[object] = [{"id": str(number), "text": "é" * 9000} for number in range(20)]


def read(path: Path, **options: object) -> list[SourceRecord | DamagedRecord]:
    config = DatasetConfig.model_validate({"name": "d", "source": str(path), **options})
    return list(read_records(config))


def values(path: Path, **options: object) -> list[object]:
    return [record.value for record in read(path, **options) if isinstance(record, SourceRecord)]


def as_lines(records: list[object]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESSIONS = {
    "bz2": bz2.compress, "xz": lzma.compress, "gz": gzip.compress, "zst": zstd, "plain": bytes,
}  # fmt: skip


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.json.xz", "a.data"])
def test_a_compression_is_known_by_the_bytes(tmp_path: Path, compression: str, name: str) -> None:
    (tmp_path / name).write_bytes(COMPRESSIONS[compression](as_lines(RECORDS).encode()))
    assert values(tmp_path / name) == RECORDS


@pytest.mark.parametrize("compression", ["bz2", "xz", "gz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_cut_compressed_file_is_damage(tmp_path: Path, compression: str, name: str) -> None:
    data = COMPRESSIONS[compression](as_lines(LARGE).encode())
    (tmp_path / name).write_bytes(data[:-9])
    with pytest.raises(CorruptError, match=f"{name}.* cannot be read to its end"):
        values(tmp_path / name)


@pytest.mark.parametrize("records", [RECORDS, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("member", ["data", "train", "rows", "conversations"])
def test_an_object_that_wraps_a_list_is_that_list(
    tmp_path: Path, records: list[object], indent: int | None, member: str
) -> None:
    path = tmp_path / "a.json"
    wrapped = {"version": "1.0", "about": {"n": 2}, member: records, "license": ["MIT"]}
    path.write_text(json.dumps(wrapped, indent=indent), encoding="utf-8")
    assert values(path) == records
    location = read(path)[1].location
    offset = int(location.rpartition(" ")[2])
    assert json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8")[offset:])[0] == records[1]
    path.write_text(json.dumps({member: records}, indent=indent), encoding="utf-8")
    assert values(path) == values(path, format="json") == records


def test_a_cut_wrapping_object_loses_no_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    data = json.dumps({"data": RECORDS, "license": "MIT"}, indent=1).encode()
    ends = [data.index(f'"id": "{number}"'.encode()) - 6 for number in range(1, 5)]
    for cut in range(40, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(CorruptError, match="accept_truncated"):
            values(path)
        kept = values(path, accept_truncated=True)
        assert kept == RECORDS[: len(kept)]
        assert len(kept) >= sum(end < cut for end in ends)


def test_two_lists_in_one_object_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": RECORDS, "test": RECORDS}))
    with pytest.raises(CorruptError, match=r"second list of records, 'test'.*its own file"):
        values(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"train": RECORDS, "eval": RECORDS}, "eval"),
        ({"eval": RECORDS, "train": RECORDS}, "eval"),
        ({"data": RECORDS, "held_out": LARGE}, "held_out"),
        ({"rows": RECORDS, "n": 5, "more": [None, *RECORDS]}, "more"),
        ({"train": RECORDS, "chats": [[{"role": "user", "content": "q"}]]}, "chats"),
        ({"train": RECORDS, "validation": {"rows": RECORDS}}, "validation"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_second_list_of_objects_is_refused_by_name(
    tmp_path: Path, beside: object, name: str, indent: int | None
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(beside, indent=indent))
    with pytest.raises(CorruptError, match=f"second list of records, '{name}'.*its own file"):
        values(tmp_path / "a.json")


def test_other_members_of_a_wrapping_object_are_no_records(tmp_path: Path) -> None:
    about = {"tags": ["a"], "test": [], "shape": [[1, 2]], "by": {"n": [1]}, "dev": {"n": 3}}
    (tmp_path / "a.json").write_text(json.dumps({**about, "data": RECORDS}))
    assert values(tmp_path / "a.json") == RECORDS
    (tmp_path / "a.json").write_text(json.dumps({"data": RECORDS, **about}))
    assert values(tmp_path / "a.json") == RECORDS


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "test": [{"in": 1}], "response": "real"},
        {"test": [{"in": 1}], "prompt": "q", "response": "real"},
        {"items": [{"in": 1}], "id": 7, "question": "q", "answer": "a"},
        {"data": [{"x": 1}], "messages": [{"role": "user", "content": "q"}]},
        {"samples": [{"x": 1}], "input_ids": [1, 2], "loss_mask": [0, 1]},
        {"test": [{"x": 1}], "conversations": [{"from": "human", "value": "q"}]},
        {"history": [{"role": "user", "content": "q"}], "examples": [{"x": 1}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_with_keys_of_a_record_is_a_record(
    tmp_path: Path, record: object, indent: int | None
) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(record, indent=indent))
        assert values(tmp_path / name) == [record]
        (tmp_path / name).write_text("\n".join(json.dumps(record, indent=indent) for _ in "ab"))
        assert values(tmp_path / name) == [record, record]


COLUMNS = {"question": ["Frage"], "answer": ["Antwort"]}


@pytest.mark.parametrize(
    "record",
    [
        {"Frage": "f", "Antwort": "a", "data": [{"x": 1}]},
        {"data": [{"x": 1}], "Frage": "f", "Antwort": "a"},
        {"Frage": "f", "items": [{"Antwort": "b", "x": 1}], "id": 3, "Antwort": 0},
        {"Frage": "f", "data": [{"role": "user", "content": "f"}], "Antwort": "a"},
        {"Frage": [{"x": 1}], "rows": [{"x": 1}], "Antwort": [{"x": 1}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_with_the_configured_columns_is_a_record(
    tmp_path: Path, record: object, indent: int | None
) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(record, indent=indent))
        assert values(tmp_path / name, **COLUMNS) == [record]
        assert values(tmp_path / name, **COLUMNS, format="json") == [record]
        (tmp_path / name).write_text("\n".join(json.dumps(record, indent=indent) for _ in "ab"))
        assert values(tmp_path / name, **COLUMNS) == [record, record]


def test_a_column_that_is_named_like_a_list_of_records_is_one(tmp_path: Path) -> None:
    columns = {"question": ["Frage"], "answer": ["data"]}
    record = {"Frage": "f", "data": [{"role": "assistant", "text": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert values(tmp_path / "a.json", **columns) == [record]
    (tmp_path / "a.json").write_text(json.dumps({"n": 2, "data": [record, record]}))
    assert values(tmp_path / "a.json", **columns) == [record, record]


@pytest.mark.parametrize("about", [{"Frage": "the questions"}, {"Antwort": 3}, {"x": 1}])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_with_some_of_the_columns_wraps_its_records(
    tmp_path: Path, about: dict[str, object], indent: int | None
) -> None:
    """All of them make a record: one alone may describe the file."""
    records = [{"Frage": f"f{n}", "Antwort": "a"} for n in range(3)]
    for wrapped in ({**about, "data": records}, {"data": records, **about}):
        (tmp_path / "a.json").write_text(json.dumps(wrapped, indent=indent))
        assert values(tmp_path / "a.json", **COLUMNS) == records


TERMS: list[object] = [{"name": f"term {n}", "description": f"it is {n}"} for n in range(3000)]
TERM_COLUMNS = {"question": ["name"], "answer": ["description"]}


@pytest.mark.parametrize("num_records", [2, 3000])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("is_list_first", [True, False])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_object_whose_list_has_the_configured_columns_wraps_it(
    tmp_path: Path, name: str, num_records: int, indent: int | None, *, is_list_first: bool
) -> None:
    about = {"name": "Glossary", "description": "3000 terms"}
    terms = TERMS[:num_records]
    wrapped = {"data": terms, **about} if is_list_first else {**about, "data": terms}
    for end in ("", "\n"):
        (tmp_path / name).write_text(json.dumps(wrapped, indent=indent) + end)
        assert values(tmp_path / name, **TERM_COLUMNS) == terms


@pytest.mark.parametrize(
    "first",
    [
        {"name": "t", "description": None},
        {"name": "t"},
        {"name": "x" * HEAD_BYTES, "description": "d"},
    ],
    ids=["blank", "without answer", "large"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_first_record_that_lacks_something_or_is_large_does_not_hide_the_list(
    tmp_path: Path, first: dict[str, object], indent: int | None
) -> None:
    records = [first, *TERMS]
    wrapped = {"name": "Glossary", "description": "3000 terms", "data": records}
    (tmp_path / "a.json").write_text(json.dumps(wrapped, indent=indent))
    assert values(tmp_path / "a.json", **TERM_COLUMNS) == records


def test_records_with_columns_named_as_parts_of_a_turn_are_no_turns(tmp_path: Path) -> None:
    columns = {"question": ["title"], "answer": ["content"]}
    records = [{"title": f"t{n}", "content": f"c{n}"} for n in range(9)]
    for about in ({}, {"title": "Glossary", "content": "9 terms"}):
        (tmp_path / "a.json").write_text(json.dumps({**about, "items": records}))
        assert values(tmp_path / "a.json", **columns) == records


@pytest.mark.parametrize("blank", [None, "", " ", []])
@pytest.mark.parametrize("size", [1, 40 * HEAD_BYTES])
def test_an_object_with_blank_columns_is_no_record(
    tmp_path: Path, blank: object, size: int
) -> None:
    records: list[object] = [{"term": "a", "x": "y" * size}, {"term": "b"}]
    for about in ({"name": "Glossary", "description": blank}, {"name": blank, "description": "d"}):
        for wrapped in ({**about, "data": records}, {"data": records, **about}):
            (tmp_path / "a.json").write_text(json.dumps(wrapped))
            assert values(tmp_path / "a.json", **TERM_COLUMNS) == records


def test_one_of_several_columns_of_the_question_may_be_blank(tmp_path: Path) -> None:
    columns = {"question": ["Frage", "Text"], "answer": ["Antwort"]}
    record = {"Frage": "f", "Text": "", "Antwort": "a", "examples": [{"x": 1}]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert values(tmp_path / "a.json", **columns) == [record]


def test_records_behind_another_list_are_not_lost_in_one_record(tmp_path: Path) -> None:
    wrapped = {"name": "Glossary", "description": "d", "test": [{"x": 1}], "data": TERMS}
    (tmp_path / "a.json").write_text(json.dumps(wrapped))
    with pytest.raises(CorruptError, match=r"second list of records, 'test', beside 'data'"):
        values(tmp_path / "a.json", **TERM_COLUMNS)


def test_a_configured_column_far_behind_a_list_is_refused_by_name(tmp_path: Path) -> None:
    record = {"Frage": "f", "test": [{"n": "x" * 999}] * 3000, "Antwort": "a"}
    (tmp_path / "a.json").write_text(json.dumps(record, indent=1))
    with pytest.raises(CorruptError, match=r"list 'test'.*'Antwort'.*dataset\.format=jsonl"):
        values(tmp_path / "a.json", **COLUMNS)
    (tmp_path / "a.json").write_text(as_lines([record, record]))
    assert values(tmp_path / "a.json", **COLUMNS) == [record, record]


def test_a_record_key_far_behind_a_list_is_refused_by_name(tmp_path: Path) -> None:
    record = {"test": [{"n": "x" * 999}] * 3000, "prompt": "q", "response": "r"}
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(CorruptError, match=r"list 'test'.*'prompt'.*dataset\.format=jsonl"):
        values(tmp_path / "a.json")
    assert values(tmp_path / "a.json", format="jsonl") == [record]


@pytest.mark.parametrize("name", ["test", "data", "items"])
@pytest.mark.parametrize("size", [HEAD_BYTES, 40 * HEAD_BYTES])
@pytest.mark.parametrize("is_list_first", [True, False])
def test_a_large_first_line_with_a_list_is_a_record(
    tmp_path: Path, name: str, size: int, *, is_list_first: bool
) -> None:
    listed: dict[str, object] = {name: [{"n": 1}, {"n": 2}]}
    large = {"note": "x" * size}
    records = [{**listed, **large} if is_list_first else {**large, **listed}, *RECORDS]
    for text in (as_lines(records), as_lines(records[:1] * 3)):
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        assert values(tmp_path / "a.jsonl") == [json.loads(line) for line in text.splitlines()]


def test_a_list_of_turns_on_each_line_is_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for lines in ([turns, turns], [[["q", "a"]], [["q", "a"]]], [[], turns]):
        (tmp_path / "a.jsonl").write_text(as_lines(list(lines)))
        with pytest.raises(CorruptError, match=r'a list of turns on each line.*"messages"'):
            values(tmp_path / "a.jsonl")


HUGE = '{"id": "h", "n": ' + "7" * 5000 + "}"


@pytest.mark.parametrize(
    "text",
    [
        f"{HUGE}\n" + as_lines(RECORDS),
        as_lines(RECORDS) + HUGE,
        f"[{HUGE}, " + json.dumps(RECORDS)[1:],
        f'{{"rows": [{HUGE}, ' + json.dumps(RECORDS)[1:] + "}",
        json.dumps({"data": RECORDS})[:-1] + f', "about": {HUGE}, "x": [-{"1" * 5000}]}}',
        f'{{"about": {HUGE}, ' + json.dumps({"data": RECORDS})[1:],
        "\n".join(json.dumps(record, indent=1) for record in RECORDS) + HUGE,
    ],
)
def test_an_integer_of_thousands_of_digits_costs_one_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = read(tmp_path / "a.json")
    assert [one.value for one in found if isinstance(one, SourceRecord)] == RECORDS
    lost = [one for one in found if isinstance(one, DamagedRecord)]
    assert [(one.reason, one.detail) for one in lost] == [
        (Reason.TOO_LARGE, "an integer of more than 4300 digits")
    ] * (text.count(HUGE) - text.count(f'"about": {HUGE}'))


@pytest.mark.parametrize("records", [RECORDS, LARGE, RECORDS[:1]], ids=["five", "large", "one"])
@pytest.mark.parametrize("indent", [0, 2, "\t"])
def test_records_may_be_printed_on_several_lines(
    tmp_path: Path, records: list[object], indent: int | str
) -> None:
    texts = [json.dumps(record, indent=indent) for record in records]
    for separator in ("\n", "\n\n", " ", ""):
        (tmp_path / "a.jsonl").write_text(separator.join(texts), encoding="utf-8")
        assert values(tmp_path / "a.jsonl") == records


def test_a_cut_record_on_several_lines_is_a_truncation(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(record, indent=2) for record in RECORDS)
    (tmp_path / "a.json").write_text(text[:-20])
    with pytest.raises(CorruptError, match=r"4 whole records before it.*accept_truncated"):
        values(tmp_path / "a.json")
    assert values(tmp_path / "a.json", accept_truncated=True) == RECORDS[:4]


@pytest.mark.parametrize(
    "record",
    [
        {"data": [{"role": "user", "content": "q"}]},
        {"conversations": [{"from": "human", "value": "q"}]},
        {"data": ["q", "a"]},
        {"messages": [{"x": 1}], "choices": [{"y": 1}]},
        {"data": []},
    ],
)
def test_a_list_of_turns_is_one_record(tmp_path: Path, record: object) -> None:
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(record, indent=indent))
        assert values(tmp_path / "a.json") == [record]


@pytest.mark.parametrize(
    "first",
    ['{"a": ', '{"a": [', '{"a": "x', '{"a": 1} x', '{"a": 1},', "{", '{"data": [{"a": '],
)
def test_a_damaged_first_line_does_not_change_the_form(tmp_path: Path, first: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{first}\n{as_lines(RECORDS)}")
    with pytest.raises(CorruptError, match=r"byte 0, 0 whole records.*accept_damaged"):
        values(tmp_path / "a.jsonl")
    assert values(tmp_path / "a.jsonl", accept_damaged=True) == RECORDS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("records", [RECORDS, LARGE], ids=["small", "large"])
def test_text_of_unicode_in_any_encoding(
    tmp_path: Path, encoding: str, records: list[object]
) -> None:
    for name, text in {
        "a.jsonl": as_lines(records),
        "b.json": json.dumps(records, indent=1, ensure_ascii=False),
        "c.json": json.dumps({"data": records}, ensure_ascii=False),
    }.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert values(tmp_path / name) == records


def test_a_table_that_a_spreadsheet_saved_as_unicode_text(tmp_path: Path) -> None:
    for name, separator in {"a.csv": ",", "b.csv": ";", "c.csv": "\t", "a.tsv": "\t"}.items():
        rows = [f"question{separator}answer", f"é?{separator}ü"]
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / name).write_bytes("\r\n".join(rows).encode(encoding))
            assert values(tmp_path / name) == [{"question": "é?", "answer": "ü"}]


def test_a_cut_character_of_utf16_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(RECORDS).encode("utf-16")[:-1])
    with pytest.raises(CorruptError, match="not valid utf-16"):
        values(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "a.parquet", "a.json"])
@pytest.mark.parametrize("kind", ["feather", "stream", "parquet"])
def test_columnar_files_are_known_by_the_bytes(tmp_path: Path, name: str, kind: str) -> None:
    table = pa.Table.from_pylist(RECORDS * 40)
    path = str(tmp_path / name)
    if kind == "feather":
        pa.feather.write_feather(table, path)
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=70)
    found = read(tmp_path / name)
    assert [record.value for record in found if isinstance(record, SourceRecord)] == RECORDS * 40
    assert found[-1].location == f"{name}, row 199"


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_a_cut_arrow_file_is_damage(tmp_path: Path, share: float) -> None:
    table = pa.Table.from_pylist(LARGE)
    pa.feather.write_feather(table, str(tmp_path / "file.arrow"))
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=5)
    for path in (tmp_path / "file.arrow", tmp_path / "stream.arrow"):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(CorruptError, match=f"{path.name} is not a complete Arrow"):
            values(path)


def test_a_format_that_the_bytes_contradict_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"form Parquet, but dataset\.format is json"):
        values(tmp_path / "a.json", format="json")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    with pytest.raises(CorruptError, match="compressed Parquet file; decompress it"):
        values(tmp_path / "a.parquet.gz")
    (tmp_path / "b.parquet").write_text(as_lines(RECORDS))
    with pytest.raises(CorruptError, match="not a complete Parquet file"):
        values(tmp_path / "b.parquet")


def zipped(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, as_lines(RECORDS))
    return sink.getvalue()


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return sink.getvalue()


def database(path: Path) -> bytes:
    connection = sqlite3.connect(path)
    connection.execute("create table a (b)")
    connection.close()
    return path.read_bytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 412\n"
REFUSED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>No</Message></Error>'
FOREIGN = {
    "pointer": (POINTER, r"Git LFS pointer \(to a file of 412 bytes\).*git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s12--ab.jsonl\n", "git annex get"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML page.*/resolve/"),
    "bare page": (b"<html lang=en><head>", "HTML page"),
    "xml": (b'<?xml version="1.0"?><records/>', "is XML"),
    "refused": (REFUSED, r"error of an object store \(AccessDenied: No\)"),
    "pdf": (b"%PDF-1.7\n", "PDF document"),
    "zip": (zipped("a.jsonl"), "ZIP archive.*unpack"),
    "excel": (zipped("xl/workbook.xml"), "Excel workbook.*CSV"),
    "tar": (tar(), "tar archive.*unpack"),
    "pickle": (b"\x80\x04\x95\x10", "a pickle"),
    "blank": (b" \n\n", "is empty"),
    "nothing but a mark": (b"\xff\xfe", "is empty"),
    "binary": (b"\x00\x01\x02" * 9, "binary data of an unknown form"),
    "yaml": (b"- question: a\n  answer: b\n", "not JSON.*'- question: a'.*JSON lines"),
    "table": (b"question,answer\na,b\n", r"not JSON.*dataset\.format=csv"),
}


@pytest.mark.parametrize("compression", ["plain", "gz"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_data_is_refused_by_name(tmp_path: Path, kind: str, compression: str) -> None:
    data, message = FOREIGN[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(COMPRESSIONS[compression](data))
    with pytest.raises(CorruptError, match=f"(?s)a\\.jsonl.*{message}") as caught:
        values(path)
    assert "accept_damaged" not in str(caught.value)


@pytest.mark.parametrize("options", [{"accept_damaged": True}, {"format": "parquet"}])
@pytest.mark.parametrize("kind", ["pointer", "page", "zip"])
def test_no_option_accepts_what_is_no_data(
    tmp_path: Path, kind: str, options: dict[str, object]
) -> None:
    data, message = FOREIGN[kind]
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(CorruptError, match=message):
        values(tmp_path / "a.parquet", **{"format": "jsonl", **options})


def test_a_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database(path)
    with pytest.raises(CorruptError, match="SQLite database"):
        values(path)


def test_a_file_of_blanks_first_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" * (HEAD_BYTES + 9) + as_lines(RECORDS).encode())
    assert values(tmp_path / "a.jsonl") == RECORDS


def test_records_on_one_line_or_with_line_breaks_of_old_macs(tmp_path: Path) -> None:
    for separator in ("\r", " ", ""):
        text = separator.join(json.dumps(record) for record in LARGE)
        (tmp_path / "a.jsonl").write_bytes(text.encode())
        assert values(tmp_path / "a.jsonl") == LARGE
