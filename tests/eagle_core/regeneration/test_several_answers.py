"""Several sampled answers per question: conversations of their own, none of them asked twice."""

import json
from collections import Counter
from pathlib import Path

import pytest

from eagle_core.data.build import load_conversations
from eagle_core.errors import ConfigError
from tests.eagle_core.regeneration.answer_server import Body, say, serving
from tests.eagle_core.regeneration.runs import (
    Make,
    adds_up,
    ask,
    conversations,
    ledger,
    questions,
)


def by_seed(body: Body) -> dict[str, object]:
    """Answer with the seed, as a sampler would: another seed, another answer."""
    return say(f"answer {body['seed']}")


def test_each_question_has_so_many_answers_each_with_its_own_seed(
    made: Make, tmp_path: Path
) -> None:
    source = made(questions(20, turns=2))
    with serving(by_seed) as server:
        done = ask(server, source, tmp_path / "out", temperature=0.8, num_answers=3)
    adds_up(done.manifest, 60)
    assert (done.num_asked, done.manifest.dropped) == (60, {})
    assert len({body["seed"] for body in server.requests}) == 120
    for body in server.requests:  # a later question follows the answers of its own copy
        for message in body["messages"][1::2]:
            assert message["content"].startswith("answer ")
    later = Counter(
        json.dumps(body["messages"][:2]) for body in server.requests if len(body["messages"]) == 3
    )
    assert set(later.values()) == {1}
    for split in ("train", "held_out"):  # no copy of a held-out question is trained on
        given = [one.conversation_id for one in load_conversations(source, split)]
        found = [one.conversation_id for one in load_conversations(tmp_path / "out", split)]
        assert found == [name + copy for name in given for copy in ("", "#2", "#3")]


def test_more_answers_ask_only_for_those(made: Make, tmp_path: Path) -> None:
    source = made(questions(10, turns=1))
    with serving(by_seed) as server:
        ask(server, source, tmp_path / "out", temperature=0.8)
        first = {one.conversation_id: one for one in conversations(tmp_path / "out")}
        more = ask(server, source, tmp_path / "out", temperature=0.8, num_answers=4)
        assert (more.num_asked, server.asked.total()) == (30, 40)
        assert ask(server, source, tmp_path / "out", temperature=0.8, num_answers=4).num_asked == 0
        kept = {one.conversation_id: one for one in conversations(tmp_path / "out")}
        assert first.items() <= kept.items()
        fewer = ask(server, source, tmp_path / "out", temperature=0.8, num_answers=2)
        assert (fewer.num_asked, server.asked.total()) == (0, 40)
    adds_up(fewer.manifest, 20)


def test_equal_answers_count_once_and_failed_ones_are_named(made: Make, tmp_path: Path) -> None:
    source = made(questions(10, turns=1))
    seeds: dict[str, list[int]] = {}

    def talk(body: Body) -> dict[str, object]:
        question = body["messages"][0]["content"]
        seeds.setdefault(question, []).append(body["seed"])
        if question == "question 1.0" and len(seeds[question]) == 2:
            return say("")
        return say("yes" if question == "question 2.0" else f"answer {body['seed']}")

    with serving(talk) as server:
        done = ask(server, source, tmp_path / "out", temperature=0.8, num_answers=2, concurrency=1)
    adds_up(done.manifest, 20)
    assert done.manifest.dropped == {"duplicate": 1, "empty_answer": 1}
    rows = {row["conversation_id"]: row for row in ledger(tmp_path / "out")}
    assert set(rows) == {"c1#2", "c2#2"}
    assert all(row["location"].endswith(", answer 2") for row in rows.values())


@pytest.mark.parametrize("turns", [1, 2])
def test_a_run_that_broke_off_goes_on_with_the_copies(
    made: Make, tmp_path: Path, turns: int
) -> None:
    source = made(questions(6, turns=turns))
    settings: dict[str, object] = {"temperature": 0.8, "num_answers": 3, "concurrency": 1}

    def fault(_times: int, _body: Body) -> str | None:
        return "404" if len(server.requests) > 7 else None

    with serving(by_seed, fault) as server, pytest.raises(ConfigError, match="404"):
        ask(server, source, tmp_path / "out", **settings)
    with serving(by_seed) as server:
        done = ask(server, source, tmp_path / "out", **settings)
        assert done.num_asked == 18 - 7 // turns
        undisturbed = ask(server, source, tmp_path / "undisturbed", **settings)
    assert done.manifest.fingerprint == undisturbed.manifest.fingerprint
