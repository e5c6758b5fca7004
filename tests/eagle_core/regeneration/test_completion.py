"""What each server sends when an answer ended, and when it did not."""

import pytest

from eagle_core.data.ledger import Reason
from eagle_core.regeneration.answers import NoAnswer
from eagle_core.regeneration.completion import parse_completion

TOOL_CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def completion(finish_reason: object, **message: object) -> dict[str, object]:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant"}}
    return {
        "object": "chat.completion",
        "choices": [choice | {"message": {"role": "assistant", "content": None, **message}}],
        "usage": {"completion_tokens": 7},
    }


def refused(value: object, **settings: object) -> tuple[Reason, str]:
    with pytest.raises(NoAnswer) as caught:
        parse_completion(value, **settings)  # type: ignore[arg-type]
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    "finish_reason", ["stop", "eos_token", "stop_sequence", "eos", "end_turn", "STOP"]
)
def test_a_stop_ends_an_answer(finish_reason: str) -> None:
    answer = parse_completion(completion(finish_reason, content="Paris."))
    assert answer.message.content == "Paris."
    assert answer.num_tokens == 7


@pytest.mark.parametrize("finish_reason", ["tool_calls", "stop", "tool_use"])
def test_a_tool_call_ends_an_answer(finish_reason: str) -> None:
    answer = parse_completion(completion(finish_reason, tool_calls=[TOOL_CALL]))
    assert [call.name for call in answer.message.tool_calls] == ["add"]


def test_the_former_function_call_ends_an_answer() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    answer = parse_completion(completion("function_call", function_call=call))
    assert [(one.name, one.arguments) for one in answer.message.tool_calls] == [("add", '{"a": 1}')]


@pytest.mark.parametrize(
    "finish_reason",
    [
        *("abort", None, "error", "content_filter"),  # vLLM and SGLang, Ollama, vLLM, OpenAI
        *("repetition", "load", "cancelled", "insufficient_system_resource", "", 1),
    ],
)
@pytest.mark.parametrize("cut_answers", ["drop", "keep"])
def test_half_an_answer_is_not_kept_as_a_whole_one(finish_reason: object, cut_answers: str) -> None:
    value = completion(finish_reason, content="The capital of France")
    reason, detail = refused(value, cut_answers=cut_answers)
    assert reason is Reason.ANSWER_NOT_ENDED
    assert (str(finish_reason) if finish_reason is not None else "no finish_reason") in detail


def test_a_completion_without_the_reason_has_not_ended() -> None:
    value = {"choices": [{"message": {"role": "assistant", "content": "half"}}]}
    assert refused(value) == (Reason.ANSWER_NOT_ENDED, "no finish_reason")


@pytest.mark.parametrize("finish_reason", ["length", "max_tokens", "model_length"])
def test_a_cut_answer_is_dropped_or_kept(finish_reason: str) -> None:
    value = completion(finish_reason, content="half a sen")
    assert refused(value) == (Reason.ANSWER_CUT, "after 7 tokens")
    assert parse_completion(value, cut_answers="keep").message.content == "half a sen"


@pytest.mark.parametrize("cut_answers", ["drop", "keep"])
@pytest.mark.parametrize("content", ["half a sen", "<think>Let me see", ""])
def test_an_answer_that_the_context_cut_is_none(content: str, cut_answers: str) -> None:
    value = completion("length", content=content)
    assert refused(value, cut_answers=cut_answers, max_tokens=8) == (
        Reason.CONTEXT_TOO_LONG,
        "the context ended after 7 tokens of the answer",
    )


def test_an_answer_of_max_tokens_is_cut_by_these() -> None:
    value = completion("length", content="half a sen")
    assert refused(value, max_tokens=7) == (Reason.ANSWER_CUT, "after 7 tokens")
    kept = parse_completion(value, cut_answers="keep", max_tokens=7)
    assert kept.message.content == "half a sen"
    assert parse_completion(completion("stop", content="Paris."), max_tokens=8).num_tokens == 7


@pytest.mark.parametrize(
    "message",
    [
        {"content": "<think>\nLet me see"},
        {"content": "  <THINK>Let me see"},
        {"content": "[THINK]Let me see"},
        {"content": "<seed:think>Let me see"},
        {"content": None, "reasoning_content": "Let me see"},
        {"content": "", "reasoning": "Let me see"},
        {"content": "\n\n", "reasoning_content": "Let me see"},
        {"content": "<think>one</think><think>Let me see"},
        {"content": "It is <think>Let me see"},
        {"content": "", "tool_calls": [TOOL_CALL]},
        {"content": "   "},
    ],
)
@pytest.mark.parametrize("cut_answers", ["drop", "keep"])
def test_a_cut_before_the_answer_is_a_cut(message: dict[str, object], cut_answers: str) -> None:
    reason, _ = refused(completion("length", **message), cut_answers=cut_answers)
    assert reason is Reason.ANSWER_CUT


@pytest.mark.parametrize("content", ["Let me see", "Let me see\n\nThe user"])
def test_a_cut_inside_reasoning_that_the_prompt_opened_is_a_cut(content: str) -> None:
    value = completion("length", content=content)
    assert refused(value, cut_answers="keep", opens_reasoning=True) == (
        Reason.ANSWER_CUT,
        "inside the reasoning",
    )


@pytest.mark.parametrize(
    ("finish_reason", "message"),
    [
        ("length", {"content": "Hm.</think>It is"}),
        ("length", {"content": "It is", "reasoning_content": "Hm."}),
        ("stop", {"content": "It is"}),
    ],
)
def test_an_answer_behind_such_reasoning_is_kept(
    finish_reason: str, message: dict[str, object]
) -> None:
    value = completion(finish_reason, **message)
    answer = parse_completion(value, cut_answers="keep", opens_reasoning=True)
    assert answer.message.content == "It is"


def test_a_cut_says_where_it_was() -> None:
    value = completion("length", reasoning_content="Let me see")
    assert refused(value, cut_answers="keep")[1] == "inside the reasoning"


@pytest.mark.parametrize("message", [{"content": "<think>Hm."}, {"reasoning_content": "Hm."}])
def test_reasoning_that_ended_without_an_answer_is_empty(message: dict[str, object]) -> None:
    assert refused(completion("stop", **message)) == (Reason.EMPTY_ANSWER, "only reasoning")


def test_an_answer_may_write_about_tags() -> None:
    text = "Write <think> first. It opens the reasoning."
    assert parse_completion(completion("stop", content=text)).message.content == text


def test_reasoning_is_apart_from_the_answer() -> None:
    message = parse_completion(completion("stop", content="<think>Hm.</think>\n\nYes.")).message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    "value",
    [
        *([], None, {}, {"choices": []}, {"choices": [{"finish_reason": "stop"}]}),
        {"error": {"message": "overloaded"}},
        completion("stop", content=[{"type": "text", "text": "a"}]),
    ],
)
def test_what_is_no_completion_is_said_to_be_none(value: object) -> None:
    with pytest.raises(ValueError, match=r"the message has list|no message in its choices"):
        parse_completion(value)


def test_a_text_beyond_the_end_of_the_turn_is_not_kept() -> None:
    value = completion("stop", content="Yes.<|im_end|>\n<|im_start|>user\nAnd?")
    assert refused(value) == (Reason.ANSWER_PAST_END, "the answer contains <|im_end|>")
