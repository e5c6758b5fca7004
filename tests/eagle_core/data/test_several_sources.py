"""Several sources in one data set: what one gives does not depend on the others."""

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from pydantic import ValidationError

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.manifest import DatasetManifest
from eagle_core.data.splits import is_held_out, is_taken
from eagle_core.data.writer import SPLITS


def write(path: Path, numbers: Iterable[int]) -> str:
    records = [{"question": f"question {n}", "answer": f"answer {n}"} for n in numbers]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def build(out_dir: Path, *sources: dict[str, object], **fields: object) -> DatasetManifest:
    config = DatasetConfig.model_validate({"name": "mix", "sources": sources, **fields})
    return build_dataset(config, out_dir=out_dir)


def questions(out_dir: Path, source: str) -> set[str]:
    """Return the questions that the data set has from one of its sources."""
    return {
        conversation.messages[0].content
        for split in SPLITS
        for conversation in load_conversations(out_dir, split)
        if conversation.location.startswith(f"{source}: ")
    }


def test_each_source_is_read_in_its_way_and_counted(tmp_path: Path) -> None:
    chat: dict[str, object] = {"name": "chat", "source": write(tmp_path / "a.jsonl", range(50))}
    (tmp_path / "b.csv").write_text("Frage,Antwort\n" + "".join(f"f{n},a\n" for n in range(30)))
    table: dict[str, object] = {
        "name": "table",
        "source": str(tmp_path / "b.csv"),
        "question": ["Frage"],
        "answer": ["Antwort"],
    }
    manifest = build(tmp_path / "out", chat, table, held_out_fraction=0.3)
    assert manifest.num_records == 80
    assert manifest.num_train + manifest.num_held_out == 80
    assert [entry["of"] for entry in manifest.source] == ["chat", "table"]
    assert list(manifest.by_source) == ["chat", "table"]
    for name, expected in {"chat": 50, "table": 30}.items():
        counts = manifest.by_source[name]
        assert counts.num_records == counts.num_train + counts.num_held_out == expected
        assert counts.num_held_out > 0
        assert len(questions(tmp_path / "out", name)) == expected


@pytest.mark.parametrize("limit", [{"weight": 0.3}, {"max_conversations": 40}, {}])
def test_what_a_source_gives_does_not_depend_on_the_others(
    tmp_path: Path, limit: dict[str, object]
) -> None:
    """Half of what a later source has is in an earlier one, too."""
    one: dict[str, object] = {"name": "one", "source": write(tmp_path / "1.jsonl", range(200))}
    two: dict[str, object] = {
        "name": "two",
        "source": write(tmp_path / "2.jsonl", range(100, 300)),
        **limit,
    }
    build(tmp_path / "alone", two)
    build(tmp_path / "both", one, two)
    alone, both = (questions(tmp_path / out, "two") for out in ("alone", "both"))
    assert both == alone - questions(tmp_path / "both", "one")
    write(tmp_path / "1.jsonl", range(500, 900))
    build(tmp_path / "both", one, two)
    assert questions(tmp_path / "both", "two") == alone


def test_a_weight_takes_a_share_that_only_grows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", range(1000))
    before: set[str] = set()
    for weight in (0.1, 0.4, 1.0):
        part: dict[str, object] = {"name": "a", "source": source, "weight": weight}
        manifest = build(tmp_path / "out", part)
        taken = questions(tmp_path / "out", "a")
        assert before <= taken
        assert abs(len(taken) / 1000 - weight) < 0.05
        assert manifest.dropped.get("not_selected", 0) == 1000 - len(taken)
        assert manifest.num_records == 1000
        before = taken
    write(tmp_path / "a.jsonl", range(1000))
    part = {"name": "a", "source": source, "weight": 0.4}
    build(tmp_path / "out", part)
    first = questions(tmp_path / "out", "a")
    write(tmp_path / "a.jsonl", range(-300, 1000))
    build(tmp_path / "out", part)
    assert first <= questions(tmp_path / "out", "a")


def test_a_weight_does_not_decide_what_is_held_out() -> None:
    keys = [xxhash.xxh3_128_hexdigest(str(number).encode()) for number in range(40_000)]
    keys = [key for key in keys if is_taken(key, 0.1)]
    share = sum(is_held_out(key, 0.1) for key in keys) / len(keys)
    assert 0.08 < share < 0.12


def test_the_ledger_names_the_source(tmp_path: Path) -> None:
    sources: list[dict[str, object]] = [
        {"name": name, "source": write(tmp_path / f"{name}.jsonl", range(9))}
        for name in ("first", "second")
    ]
    manifest = build(tmp_path / "out", *sources)
    assert manifest.dropped == {"duplicate": 9}
    assert manifest.by_source["second"].num_records == 9
    assert manifest.by_source["second"].num_train == 0
    locations = pq.read_table(tmp_path / "out" / "ledger.parquet")["location"].to_pylist()
    assert all(location.startswith("second: second.jsonl, record ") for location in locations)


def test_a_source_that_changed_or_was_added_is_built_anew(tmp_path: Path) -> None:
    one: dict[str, object] = {"name": "one", "source": write(tmp_path / "1.jsonl", range(20))}
    two: dict[str, object] = {"name": "two", "source": write(tmp_path / "2.jsonl", range(30, 50))}
    first = build(tmp_path / "out", one)
    assert build(tmp_path / "out", one) == first
    assert build(tmp_path / "out", one, two).num_records == 40
    write(tmp_path / "2.jsonl", range(30, 60))
    assert build(tmp_path / "out", one, two).num_records == 50


def test_a_preset_may_be_one_of_several(tmp_path: Path) -> None:
    config = DatasetConfig.model_validate(
        {
            "name": "mix",
            "sources": [
                {"name": "a", "source": "preset:sharegpt-packaged", "max_conversations": 5},
                {"name": "b", "source": "preset:math", "streaming": True, "subsets": ["algebra"]},
            ],
        }
    )
    assert config.parts[0].accept_truncated
    assert config.parts[0].keep_pieces_together
    assert config.parts[1].subsets == ("algebra",)
    assert config.parts[1].question == ("problem",)
    one = {"name": "a", "source": "preset:sharegpt-packaged", "max_conversations": 5}
    assert build(tmp_path / "out", one).num_conversations == 5


def write_pieces(path: Path, chats: Iterable[int], word: str) -> str:
    """Write three pieces of every chat, with ids `CHAT_0` to `CHAT_2`."""
    records = [
        {"id": f"{chat}_{piece}", "question": f"{word} {chat} {piece}", "answer": "a"}
        for chat in chats
        for piece in range(3)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def held_out(out_dir: Path, source: str) -> set[str]:
    return {
        one.messages[0].content
        for one in load_conversations(out_dir, "held_out")
        if one.location.startswith(f"{source}: ")
    }


def test_pieces_of_one_source_move_nothing_of_the_others(tmp_path: Path) -> None:
    one: dict[str, object] = {
        "name": "one",
        "source": write_pieces(tmp_path / "1.jsonl", range(40), "one"),
    }
    two: dict[str, object] = {
        "name": "two",
        "source": write_pieces(tmp_path / "2.jsonl", range(40), "two"),
    }
    build(tmp_path / "before", one, two, held_out_fraction=0.3)
    one["keep_pieces_together"] = True
    build(tmp_path / "after", one, two, held_out_fraction=0.3)
    assert held_out(tmp_path / "after", "two") == held_out(tmp_path / "before", "two")
    together = held_out(tmp_path / "after", "one")
    chats = {question.split()[1] for question in together}
    assert len(together) == 3 * len(chats)
    assert 0 < len(chats) < 40


def test_equal_ids_of_two_sources_are_two_chats(tmp_path: Path) -> None:
    parts: list[dict[str, object]] = [
        {
            "name": name,
            "source": write_pieces(tmp_path / f"{name}.jsonl", range(40), name),
            "keep_pieces_together": True,
        }
        for name in ("one", "two")
    ]
    build(tmp_path / "out", *parts, held_out_fraction=0.3)
    chats = [
        {question.split()[1] for question in held_out(tmp_path / "out", name)}
        for name in ("one", "two")
    ]
    assert chats[0] != chats[1]


def test_a_question_that_two_sources_have_is_in_one_split(tmp_path: Path) -> None:
    """One of them is grouped by chats: the other's follows the chat that begins with it."""
    one: dict[str, object] = {
        "name": "one",
        "source": write_pieces(tmp_path / "1.jsonl", range(40), "q"),
        "keep_pieces_together": True,
    }
    records = [{"question": f"q {chat} 0", "answer": "other"} for chat in range(40)]
    (tmp_path / "2.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    two: dict[str, object] = {"name": "two", "source": str(tmp_path / "2.jsonl")}
    build(tmp_path / "out", one, two, held_out_fraction=0.3)
    firsts = {text for text in held_out(tmp_path / "out", "one") if text.endswith(" 0")}
    assert held_out(tmp_path / "out", "two") == firsts != set()


PART = {"name": "a", "source": "a.jsonl"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give `source`, or `sources`"),
        ({"source": "a.jsonl", "sources": [PART]}, "not both"),
        ({"sources": [PART], "max_conversations": 3}, "give max_conversations to each"),
        ({"sources": [PART], "split": "test", "weight": 0.5}, "give split, weight to each"),
        ({"sources": [PART, {**PART, "source": "b.jsonl"}]}, "two of `sources` have one name"),
        ({"sources": [{"name": "a", "source": "regenerated"}]}, "cannot be one of `sources`"),
        ({"sources": [{**PART, "max_length": 9}]}, "max_length"),
        ({"sources": [{**PART, "weight": 0}]}, "greater than 0"),
        ({"sources": [{"name": "a"}]}, "source"),
    ],
)
def test_settings_that_contradict_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DatasetConfig.model_validate({"name": "d", **fields})


def test_a_data_set_of_one_source_is_what_it_was(tmp_path: Path) -> None:
    """A new key with its default makes no data set different from the one on disk."""
    source = write(tmp_path / "a.jsonl", range(30))
    config = DatasetConfig(name="d", source=source, max_conversations=10)
    assert not {"sources", "weight", "streaming"} & config.identity().keys()
    manifest = build_dataset(config, out_dir=tmp_path / "out")
    assert manifest.num_conversations == manifest.num_records == 10
    assert manifest.by_source == {}
    assert manifest.source[0].keys() == {"name", "size", "digest"}
