"""An engine's server that is started for the answers, ends in the middle, and is started again."""

from collections import Counter
from pathlib import Path

import pytest

from eagle_core.data.conversation import Message
from eagle_core.errors import ConfigError, TransientError
from eagle_core.regeneration import engine_answers
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.engine_answers import EngineAnswers, context_tokens
from eagle_core.regeneration.regenerate import Regenerated, Regeneration
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.config import TemplateConfig
from tests.eagle_core.regeneration.runs import Make, adds_up, conversations, questions
from tests.eagle_core.regeneration.served_engine import NotingEngine

CONFIG = RegenerationConfig(
    engine="vllm", max_tokens=8, concurrency=2, temperature=0.5, top_p=0.9, num_answers=2
)


@pytest.fixture
def target(tiny_target_path: Path) -> TargetConfig:
    return TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")


def answered(
    engine: NotingEngine,
    target: TargetConfig,
    source: Path,
    out_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: RegenerationConfig = CONFIG,
) -> Regenerated:
    """Run to the end, or to that of the server."""
    monkeypatch.setattr(engine_answers, "find_engine", lambda _name, _target: engine)
    answers = EngineAnswers(target, config)
    return Regeneration(config, answers, source=source, out_dir=out_dir).run()


def test_a_server_that_ends_in_the_middle_is_started_again_and_asked_only_the_rest(
    made: Make, target: TargetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, log = made(questions(12)), tmp_path / "log"
    dying = NotingEngine(log, last_request=20)
    with pytest.raises(TransientError, match=r"Test 1 ended while it served: status 3\n.*luck"):
        answered(dying, target, source, tmp_path / "out", monkeypatch)
    healthy = NotingEngine(log)
    done = answered(healthy, target, source, tmp_path / "out", monkeypatch)
    adds_up(done.manifest, 24)
    assert done.manifest.dropped == {}
    asked = Counter(
        str((body["seed"], body["messages"])) for body in healthy.requests() if "seed" in body
    )
    num_again = sum(count - 1 for count in asked.values())
    assert num_again <= 4  # both turns of what two workers had not finished
    undisturbed = answered(
        NotingEngine(tmp_path / "other"), target, source, tmp_path / "undisturbed", monkeypatch
    )
    assert done.manifest.fingerprint == undisturbed.manifest.fingerprint
    assert conversations(tmp_path / "out") == conversations(tmp_path / "undisturbed")


def test_without_a_question_no_server_is_started(
    made: Make, target: TargetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, engine = made(questions(6)), NotingEngine(tmp_path / "log")
    answered(engine, target, source, tmp_path / "out", monkeypatch)
    (tmp_path / "out" / "manifest.json").unlink()  # killed between answers and data set
    again = answered(engine, target, source, tmp_path / "out", monkeypatch)
    assert (again.num_asked, len(engine.served)) == (0, 1)
    adds_up(again.manifest, 12)


@pytest.mark.parametrize("cut_answers", ["drop", "keep"])
def test_answers_that_the_context_cut_are_asked_again_with_a_longer_one(
    made: Make,
    target: TargetConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_answers: str,
) -> None:
    source, engine = made(questions(6)), NotingEngine(tmp_path / "log", needed_length=100)
    short, long = (
        CONFIG.model_copy(update={"cut_answers": cut_answers, "context_tokens": tokens})
        for tokens in (64, 128)
    )
    with pytest.raises(
        ConfigError, match=r"context_too_long.*check the server, regeneration\.context_tokens"
    ):
        answered(engine, target, source, tmp_path / "out", monkeypatch, short)
    done = answered(engine, target, source, tmp_path / "out", monkeypatch, long)
    assert done.num_asked == 12
    adds_up(done.manifest, 12)
    assert done.manifest.dropped == {}


def test_what_is_served_and_sent_follows_the_settings(
    made: Make,
    target: TargetConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    template = TemplateConfig(chat_template="plain", enable_thinking=False)
    other = target.model_copy(update={"template": template})
    tokenizer = conversation_tokenizer(other)
    length = len(tokenizer.prompt([Message(role="user", content="a")]))
    engine = NotingEngine(tmp_path / "log", num_prompt_tokens=length)
    config = CONFIG.model_copy(update={"tool_parser": "hermes", "reasoning_parser": "qwen3"})
    answered(engine, other, made(questions(6)), tmp_path / "out", monkeypatch, config)
    assert "another prompt" not in caplog.text
    (served,) = engine.served
    assert (served.slots, served.max_length, served.draft) == (2, 512, None)
    assert not served.is_measured
    assert (served.tool_parser, served.reasoning_parser) == ("hermes", "qwen3")
    assert served.chat_template is not None
    assert "### Assistant" in served.chat_template
    _, *requests = engine.requests()
    for body in requests:
        assert (body["temperature"], body["its_top_p"]) == (0.5, 0.9)
        assert body["stop_token_ids"] == sorted(tokenizer.stop_ids)
        assert body["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}


def test_another_prompt_than_eyas_has_is_said(
    made: Make,
    target: TargetConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = NotingEngine(tmp_path / "log", num_prompt_tokens=3)
    answered(engine, target, made(questions(6)), tmp_path / "out", monkeypatch)
    assert "Test 1 makes 3 tokens of a question of which Eyas makes" in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"max_tokens": 100}, 512), ({"max_tokens": 100, "context_tokens": 300}, 300)],
)
def test_the_context_is_bounded_by_the_positions(
    target: TargetConfig, settings: dict[str, object], expected: int
) -> None:
    config = RegenerationConfig.model_validate({"engine": "vllm", **settings})
    assert context_tokens(target, config) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "max_tokens is 2,048, but the server of target tiny holds 512 tokens"),
        ({"context_tokens": 600}, "context_tokens is 600, but target tiny has 512 positions"),
        ({"context_tokens": 64, "max_tokens": 64}, "no room for a question"),
    ],
)
def test_a_context_without_room_is_refused(
    target: TargetConfig, settings: dict[str, object], words: str
) -> None:
    config = RegenerationConfig.model_validate({"engine": "vllm", **settings})
    with pytest.raises(ConfigError, match=words):
        context_tokens(target, config)
