"""No field is lost in silence, and a table is no other data set than its JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.manifest import DatasetManifest
from eagle_core.data.normalise import normalise

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def built(
    path: Path, records: Sequence[object], **fields: object
) -> tuple[DatasetManifest, list[Conversation]]:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    config = DatasetConfig.model_validate(
        {"name": "d", "source": str(path), "held_out_fraction": 0, **fields}
    )
    out_dir = path.with_suffix(".built")
    manifest = build_dataset(config, out_dir=out_dir)
    return manifest, list(load_conversations(out_dir, "train"))


def ledger(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(
        path.with_suffix(".built") / "ledger.parquet"
    ).to_pylist()
    return rows


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": TURNS}, ()),
        ({"messages": TURNS, "id": 3, "prompt_id": "p", "score": None, "tags": []}, ()),
        ({"messages": TURNS, "score": 0.5, "flag": False}, ("flag", "score")),
        ({"messages": TURNS, "prompt": "q"}, ("prompt",)),
        ({"messages": TURNS, "system": {"text": "s"}}, ("system",)),
        ({"question": "q", "answer": "a", "choices": {"text": ["x"], "label": []}}, ("choices",)),
        ({"question": "q", "answer": "a", "context": "c"}, ("context",)),
        ({"question": "q", "answer": "a", "meta": {"a": None, "b": [" "]}}, ()),
        ({"instruction": "q", "output": "a", "history": "before"}, ("history",)),
        (
            {"messages": [{**TURNS[0], "value": "other"}, {**TURNS[1], "annotations": ["x"]}]},
            ("turn.annotations", "turn.value"),
        ),
    ],
)
def test_what_is_not_read_is_named(record: object, unread: tuple[str, ...]) -> None:
    assert normalise(record, location="x").unread == unread


def test_rendered_text_leaves_the_other_columns_unread() -> None:
    record = {"text": "<s>q", "id": "1", "tools": "x"}
    assert normalise(record, location="x", rendered_text="text").unread == ("tools",)


def test_manifest_and_ledger_count_unread_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        {"question": f"q{number}", "answer": "a", "source": "web", "score": number or None}
        for number in range(1200)
    ]
    manifest, _ = built(path, [*records, records[5], {"question": "", "source": "web"}])
    assert manifest.unread == {"score": 1199, "source": 1200}  # of what is kept
    score, source = (row for row in ledger(path) if row["action"] == "unread")
    assert (score["reason"], source["reason"]) == ("score", "source")
    assert source["location"].startswith("a.jsonl")
    assert source["detail"].startswith("1,200 records, also a.jsonl")
    assert len(ledger(path)) == manifest.num_dropped + 2


def test_names_of_fields_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        {"question": f"q{number}", "answer": "a", f"id-{number}": 1, "\ud83d" * 200: "x"}
        for number in range(500)
    ]
    manifest, _ = built(path, records)
    assert len(manifest.unread) == 201
    assert manifest.unread["(further fields)"] > 250
    assert max(map(len, manifest.unread)) == 80


TOOL_RECORDS = [
    {
        "id": str(number),
        "tools": [{"type": "function", "function": {"name": "sky", "parameters": parameters}}],
        "messages": [
            {"role": "user", "content": f"Rain {number}?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "sky", "arguments": given}}
                ],
            },
            {"role": "tool", "content": "wet", "tool_call_id": "c"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"},
        ],
    }
    for number, (given, parameters) in enumerate(
        [({"city": "Rome"}, {"city": {"type": "string"}}), ({"a": 1}, {"a": {"minimum": 0}})]
    )
]


def test_json_lines_and_parquet_give_the_same_conversations(tmp_path: Path) -> None:
    lines, from_lines = built(tmp_path / "lines.jsonl", TOOL_RECORDS)
    table, from_table = built(tmp_path / "table.parquet", TOOL_RECORDS)
    assert from_lines == from_table
    assert table.fingerprint == lines.fingerprint
    assert from_table[0].messages[1].tool_calls[0].arguments == '{"city": "Rome"}'
    assert lines.changed == {}
    assert table.changed == {"null_members_dropped": 2}
    (row,) = ledger(tmp_path / "table.parquet")
    assert (row["action"], row["reason"]) == ("changed", "null_members_dropped")
    assert row["detail"].startswith("2 records, also table.parquet")


def test_nulls_that_were_written_are_dropped_like_those_of_tables(tmp_path: Path) -> None:
    records = [json.loads(json.dumps(TOOL_RECORDS[0]))]
    call = records[0]["messages"][1]["tool_calls"][0]["function"]
    call["arguments"] = {"city": "Rome", "a": None, "list": [None, {"b": None}]}
    manifest, (conversation,) = built(tmp_path / "a.jsonl", records)
    arguments = conversation.messages[1].tool_calls[0].arguments
    assert arguments == '{"city": "Rome", "list": [null, {}]}'
    assert manifest.changed == {"null_members_dropped": 1}


def test_one_table_of_several_forms(tmp_path: Path) -> None:
    records = [
        {"instruction": "q1", "output": "a1"},
        {"prompt": "q2", "completion": "a2"},
        {"conversations": [{"from": "human", "value": "q3"}, {"from": "gpt", "value": "a3"}]},
        {"messages": [*TURNS, {"role": "tool", "content": "x", "name": "f"}]},
    ]
    names = sorted({name for record in records for name in record})
    filled = [{name: record.get(name) for name in names} for record in records]
    _, conversations = built(tmp_path / "a.parquet", filled)
    assert [one.messages[0].content for one in conversations] == ["q1", "q2", "q3", "q"]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_turns_in_a_column_of_json_text(key: str) -> None:
    record = {key: json.dumps(TURNS)}
    assert [one.content for one in normalise(record, location="x").conversation.messages] == [
        "q", "a",
    ]  # fmt: skip
    each = {key: [json.dumps(turn) for turn in TURNS]}
    assert normalise(each, location="x") == normalise(record, location="x")
    with pytest.raises(RejectedRecord) as caught:
        normalise({key: "[not json"}, location="x")
    assert caught.value.reason is Reason.NO_MESSAGES


def _nested(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS, "meta": _nested(5000)},
        {"messages": TURNS, "tools": "[" * 100_000},
        {"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"name": "f", "id": _nested(5000)}]}]},
    ],
)
def test_a_record_that_is_nested_too_deeply_is_dropped_alone(record: object) -> None:
    with pytest.raises(RejectedRecord, match="nested too deeply"):
        normalise(record, location="x")


def test_openais_own_data_with_thinking() -> None:
    """Of gpt-oss: the columns repeat what the turns say."""
    record = {
        "developer": "Be kind.",
        "user": "q",
        "analysis": "hm",
        "final": "a",
        "messages": [
            {"role": "system", "content": "Be kind.", "thinking": None},
            {**TURNS[0], "thinking": None},
            {**TURNS[1], "thinking": "hm"},
        ],
    }
    found = normalise(record, location="x")
    assert found.conversation.messages[2].reasoning_content == "hm"
    assert found.unread == ("analysis", "developer", "final", "user")
