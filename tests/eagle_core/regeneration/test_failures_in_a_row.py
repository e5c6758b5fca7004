"""Which rows of refusals end a run, and that what is refused is asked again."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eagle_core.errors import ConfigError
from tests.eagle_core.regeneration.answer_server import Body, echo, say, serving
from tests.eagle_core.regeneration.runs import (
    Make,
    adds_up,
    ask,
    conversations,
    ledger,
    questions,
)


def number_of(body: Body) -> int:
    return int(body["messages"][0]["content"].split()[1].partition(".")[0])


def echoing_words(times: int, body: Body) -> tuple[int, str]:
    """Refuse as servers do that quote the request, with an id of their own."""
    quoted = body["messages"][0]["content"]
    return 400, json.dumps({"error": f"req-{id(body):x}{times}: cannot parse '{quoted}'"})


def different_words(_times: int, body: Body) -> tuple[int, str]:
    letters = "".join(chr(ord("a") + int(digit)) for digit in str(number_of(body)))
    return 400, f"{letters} is wrong"


@pytest.mark.parametrize(
    ("fault", "most"),
    [
        (lambda _times, _body: "400", 5),
        (lambda _times, _body: "422", 5),
        (lambda _times, _body: "413", 5),
        (echoing_words, 5),
        (different_words, 20),
    ],
)
def test_equal_refusals_end_the_run_and_are_asked_again(
    made: Make, tmp_path: Path, fault: Callable[[int, Body], str], most: int
) -> None:
    source = made(questions(60))
    with (
        serving(fault=fault) as server,
        pytest.raises(ConfigError, match=r"had no answer, the last with turn 1: status 4\d\d: "),
    ):
        ask(server, source, tmp_path / "out")
    assert server.asked.total() <= most + 4
    assert not (tmp_path / "out" / "manifest.json").exists()
    with serving() as server:  # mended
        done = ask(server, source, tmp_path / "out")
        assert (done.num_asked, done.num_answered) == (60, 60)
        assert done.manifest.dropped == {}
        assert ask(server, source, tmp_path / "out").num_asked == 0


@pytest.mark.parametrize("finish_reason", ["abort", "error", "content_filter", None])
def test_answers_that_the_server_broke_off_are_asked_again(
    made: Make, tmp_path: Path, finish_reason: str | None
) -> None:
    source = made(questions(12))

    def talk(body: Body) -> dict[str, object]:
        broken = number_of(body) < 3
        return say("half", finish_reason=finish_reason) if broken else echo(body)  # type: ignore[arg-type]

    with serving(talk) as server:
        done = ask(server, source, tmp_path / "out", cut_answers="keep")
    adds_up(done.manifest, 12)
    assert done.manifest.dropped == {"answer_not_ended": 3}
    assert "half" not in str(conversations(tmp_path / "out"))
    with serving() as server:
        again = ask(server, source, tmp_path / "out", cut_answers="keep")
    assert (again.num_asked, again.manifest.dropped) == (3, {})


def test_quick_refusals_do_not_end_a_run_whose_answers_are_slow(made: Make, tmp_path: Path) -> None:
    source = made(questions(30, turns=1))

    def talk(body: Body) -> dict[str, object]:
        time.sleep(1)
        return echo(body)

    fault = lambda _times, body: "400" if number_of(body) % 10 else None  # noqa: E731
    with serving(talk, fault) as server:
        done = ask(server, source, tmp_path / "out", concurrency=4)
    adds_up(done.manifest, 30)
    assert done.manifest.dropped == {"request_refused": 27}
    assert done.manifest.num_conversations == 3
    assert done.examples["request_refused"] == "turn 1: status 400: fault 400"


def test_a_server_that_begins_to_refuse_ends_the_run_too(made: Make, tmp_path: Path) -> None:
    source = made(questions(90, turns=1))
    with (
        serving(fault=lambda _times, _body: "400" if len(server.asked) > 10 else None) as server,
        pytest.raises(ConfigError, match="had no answer, the last with turn 1: status 400"),
    ):
        ask(server, source, tmp_path / "out")
    assert server.asked.total() < 60
    with serving() as server:
        done = ask(server, source, tmp_path / "out")
    assert 80 <= done.num_asked < 90  # the answers before it were kept
    assert server.asked.total() == done.num_asked
    assert done.manifest.dropped == {}


def test_what_stays_refused_does_not_keep_new_questions_from_their_answers(
    made: Make, tmp_path: Path
) -> None:
    few, many = made(questions(40, turns=1)), made(questions(60, turns=1), name="many")
    fault = lambda _times, body: "400" if number_of(body) % 2 else None  # noqa: E731
    with serving(fault=fault) as server:
        ask(server, few, tmp_path / "out")
        done = ask(server, many, tmp_path / "out")
        assert done.num_answered == 10
        assert done.manifest.dropped == {"request_refused": 30}
        before = server.asked.total()
        again = ask(server, many, tmp_path / "out")  # a data set is there: no error
    assert again.manifest.fingerprint == done.manifest.fingerprint
    assert again.manifest.dropped == {"request_refused": 30}
    assert server.asked.total() - before <= 5 + 4


def test_answers_before_a_refusal_are_kept_and_not_asked_again(made: Make, tmp_path: Path) -> None:
    source = made(questions(10, turns=3))

    def fault(_times: int, body: Body) -> str | None:
        return "400" if number_of(body) < 4 and len(body["messages"]) == 3 else None

    with serving(fault=fault) as server:
        done = ask(server, source, tmp_path / "out")
    assert done.manifest.dropped == {}
    assert done.manifest.changed == {"ended_before_unanswered": 4}
    assert "request_refused, turn 3: status 400" in ledger(tmp_path / "out")[0]["detail"]
    with serving() as server:
        again = ask(server, source, tmp_path / "out")
        assert server.asked.total() == 4 * 2
        assert again.num_tokens == 4 * 2 * 3
    assert again.manifest.changed == {}
    undisturbed = tmp_path / "undisturbed"
    with serving() as server:
        ask(server, source, undisturbed)
    assert conversations(undisturbed) == conversations(tmp_path / "out")
