"""Texts that go on after the assistant's turn, and texts that only look like it."""

from pathlib import Path

import pytest

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.regeneration.answers import NoAnswer
from eagle_core.regeneration.past_end import require_one_turn, special_tokens
from eagle_core.target.config import TargetConfig


@pytest.mark.parametrize(
    "text",
    [
        "Yes.<|im_end|>\n<|im_start|>user\nAnd?",
        "Yes.<|eot_id|><|start_header_id|>user<|end_header_id|>",
        "Yes.<end_of_turn>\n<start_of_turn>user\nAnd?",
        "Yes.<\uff5cend\u2581of\u2581sentence\uff5c>",
        "Yes.<|end|><|start|>user",
        "Yes.\nuser\nAnd the other?\nassistant\nNo.",
        "Yes.\n\n human \n\nAnd the other?\n model\nNo.",
    ],
)
@pytest.mark.parametrize("field", ["content", "reasoning_content"])
def test_further_turns_are_seen(text: str, field: str) -> None:
    message = Message(role="assistant", **{"content": "", field: text})  # type: ignore[arg-type]
    with pytest.raises(NoAnswer, match="the answer contains") as caught:
        require_one_turn(message, ())
    assert caught.value.reason is Reason.ANSWER_PAST_END


@pytest.mark.parametrize(
    "text",
    [
        "Strike it out: <s>old</s>, and [INST] is Llama 2's.",
        "In F# write `x <| f |> g`, and <|> is Haskell's.",
        "Fields:\nuser\nname\npassword",
        "The assistant\nhelps a user\nwith a model",
        "\n" * 20_000,
        "",
    ],
)
def test_what_only_looks_like_it_is_kept(text: str) -> None:
    require_one_turn(Message(role="assistant", content=text), ())


def test_special_tokens_are_those_of_the_targets_tokenizer(tiny_target_path: Path) -> None:
    target = TargetConfig(name="tiny", model=str(tiny_target_path))
    tokens = special_tokens(target)
    assert "<|im_end|>" in tokens
    with pytest.raises(NoAnswer, match=r"contains <\|im_start\|>"):
        require_one_turn(Message(role="assistant", content="a <|im_start|>"), tokens)


@pytest.mark.parametrize("tokenizer", [None, '{"added_tokens": [', "version https://git-lfs"])
def test_without_a_tokenizer_there_are_none(tmp_path: Path, tokenizer: str | None) -> None:
    if tokenizer is not None:
        (tmp_path / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    assert special_tokens(TargetConfig(name="a", model=str(tmp_path))) == ()
    assert special_tokens(TargetConfig(name="a", model="nobody/not-here")) == ()


def test_tokens_that_end_nothing_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [{"content": "<unk>", "special": true}, {"content": "</s>",'
        ' "special": true}, {"content": "<tool>", "special": false},'
        ' {"content": "sop", "special": true}, {"content": "[MASK]", "special": true}]}',
        encoding="utf-8",
    )
    assert special_tokens(TargetConfig(name="a", model=str(tmp_path))) == ("</s>",)
