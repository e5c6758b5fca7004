"""The target run here: what ends its answers, and where max_tokens may cut them."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.regeneration.answers import Answer, NoAnswer, Question
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.generation_prompt import served_target_opens_reasoning
from eagle_core.regeneration.local import LocalAnswers
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.config import TemplateConfig
from tests.tiny import CHAT_TEMPLATE

REASONS_FIRST = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


def asked(path: Path, *, template: str | None = None, **settings: object) -> Answer:
    target = TargetConfig(
        name="tiny",
        model=str(path),
        dtype="float32",
        device="cpu",
        template=TemplateConfig(chat_template=template),
    )
    answers = LocalAnswers(target, RegenerationConfig.model_validate(settings))
    message = Message(role="user", content="Tell me a fact about rivers.")
    with answers.ready():
        return asyncio.run(answers.ask(Question(messages=(message,), tools="", seed=0)))


def test_an_answer_that_reaches_max_tokens_is_cut(tiny_target_path: Path) -> None:
    with pytest.raises(NoAnswer) as caught:
        asked(tiny_target_path, max_tokens=3)
    assert (caught.value.reason, caught.value.detail) == (Reason.ANSWER_CUT, "after 3 tokens")
    assert asked(tiny_target_path, max_tokens=3, cut_answers="keep").num_tokens == 3


def test_a_sampled_answer_depends_on_no_other_question(tiny_target_path: Path) -> None:
    target = TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")
    config = RegenerationConfig(max_tokens=6, temperature=1.0, cut_answers="keep")
    questions = [
        Question(messages=(Message(role="user", content=text),), tools="", seed=seed)
        for text, seed in (("Rivers?", 3), ("Seas?", 3), ("Rivers?", 4))
    ]

    def answers(order: tuple[int, ...]) -> dict[int, str]:
        local = LocalAnswers(target, config)
        with local.ready():
            return {
                number: asyncio.run(local.ask(questions[number])).message.content
                for number in order
            }

    together = answers((0, 1, 2))
    assert together == answers((2, 0, 1))
    assert together[1] == answers((1,))[1]
    assert together[0] != together[2], "another seed"


@pytest.mark.parametrize("cut_answers", ["drop", "keep"])
def test_reasoning_that_the_template_opened_is_no_answer(
    tiny_target_path: Path, cut_answers: str
) -> None:
    assert "<think>" in REASONS_FIRST
    with pytest.raises(NoAnswer) as caught:
        asked(tiny_target_path, template=REASONS_FIRST, max_tokens=3, cut_answers=cut_answers)
    assert caught.value.reason is Reason.ANSWER_CUT
    if cut_answers == "keep":
        assert caught.value.detail == "inside the reasoning"


def test_a_served_target_is_asked_for_its_template_only_if_it_is_here(
    tiny_target_path: Path,
) -> None:
    target = TargetConfig(name="tiny", model=str(tiny_target_path))
    assert not served_target_opens_reasoning(target, thinking=None)
    template = TemplateConfig(chat_template=REASONS_FIRST)
    opening = target.model_copy(update={"template": template})
    assert served_target_opens_reasoning(opening, thinking=None)
    elsewhere = opening.model_copy(update={"model": "nobody/not-here"})
    assert not served_target_opens_reasoning(elsewhere, thinking=None)


def test_what_ends_an_answer_is_the_targets_stop_token(
    tiny_target_path: Path, tmp_path: Path
) -> None:
    """Every token that the target generates here is one: the first ends the answer."""
    path = tmp_path / "stops"
    shutil.copytree(tiny_target_path, path)
    config = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    vocab_size = json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config["eos_token_id"] = list(range(vocab_size))
    (path / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(NoAnswer) as caught:
        asked(path, max_tokens=1)
    assert caught.value.reason is Reason.EMPTY_ANSWER


def test_answers_are_asked_anew_only_where_they_now_end_elsewhere(
    tiny_target_path: Path, tmp_path: Path
) -> None:
    """A journal of earlier versions, which read only the declared stop tokens, stays usable."""
    folder = shutil.copytree(tiny_target_path, tmp_path / "target")

    def identity() -> dict[str, object]:
        target = TargetConfig(name="tiny", model=str(folder), dtype="float32", device="cpu")
        return dict(LocalAnswers(target, RegenerationConfig()).identity())

    assert "stop_ids" not in identity()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    assert identity()["stop_ids"] == [1]
