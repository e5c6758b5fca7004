"""A server's chat completion, parsed into an answer.

Invariant: an answer is kept only if the server says that it ended: by a stop token, a stop text or
a tool call. The values of `finish_reason` are those of OpenAI, vLLM, SGLang, llama.cpp, TGI, Ollama
and hosted servers.
"""

from collections.abc import Collection, Mapping
from typing import Literal

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.data.records.calls import parse_tool_calls
from eagle_core.regeneration.answers import Answer, NoAnswer, usable, with_opened_reasoning
from eagle_core.regeneration.past_end import require_one_turn

_ENDED = {
    *("stop", "tool_calls", "function_call"),  # OpenAI's, and everybody's
    *("eos_token", "stop_sequence", "eos", "end_turn", "tool_use"),  # TGI, hosted servers
}
_CUT = {"length", "max_tokens", "model_length"}


def parse_completion(
    value: object,
    *,
    cut_answers: Literal["drop", "keep"] = "drop",
    special_tokens: Collection[str] = (),
    opens_reasoning: bool = False,
    max_tokens: int | None = None,
) -> Answer:
    """Return the answer in a chat completion's first choice.

    `opens_reasoning` says that the prompt ends with the opening tag of the reasoning. `max_tokens`
    are those of the request, of a server that counts tokens: a shorter cut answer is one that its
    context ended.

    Raises:
        NoAnswer: it did not end, was cut, is empty, or goes on after its end. `CONTEXT_TOO_LONG`
            where the context ended, whatever `cut_answers` is.
        ValueError: this is no chat completion.
        RejectedRecord: a tool call is malformed.

    """
    try:
        choice = value["choices"][0]  # type: ignore[index]  # any other type fails below
        finish_reason, message = choice.get("finish_reason"), _message(choice["message"])
        num_tokens = int((value.get("usage") or {}).get("completion_tokens") or 0)  # type: ignore[attr-defined]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no message in its choices ({type(error).__name__})") from error
    is_cut = _is_cut(finish_reason)
    if is_cut and max_tokens is not None and num_tokens < max_tokens:
        raise NoAnswer(
            Reason.CONTEXT_TOO_LONG, f"the context ended after {num_tokens} tokens of the answer"
        )
    if is_cut and cut_answers == "drop":
        raise NoAnswer(Reason.ANSWER_CUT, f"after {num_tokens or 'max_tokens'} tokens")
    require_one_turn(message, special_tokens)
    if is_cut and opens_reasoning:  # a whole answer may have had its empty reasoning taken off
        message = with_opened_reasoning(message)
    return Answer(message=usable(message, is_cut=is_cut), num_tokens=num_tokens)


def _is_cut(finish_reason: object) -> bool:
    reason = str(finish_reason).lower()
    if reason in _ENDED:
        return False
    if reason in _CUT:
        return True
    raise NoAnswer(
        Reason.ANSWER_NOT_ENDED,
        "no finish_reason" if finish_reason is None else f"finish_reason {str(finish_reason)[:40]}",
    )


def _message(reply: Mapping[str, object]) -> Message:
    calls = reply.get("tool_calls") or [
        {"function": call} for call in [reply.get("function_call")] if call
    ]
    return Message(
        role="assistant",
        content=_text(reply.get("content")),
        reasoning_content=_text(reply.get("reasoning_content") or reply.get("reasoning")),
        tool_calls=parse_tool_calls(calls, location="the answer"),
    )


def _text(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"the message has {type(value).__name__} instead of text")
