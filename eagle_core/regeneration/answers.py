"""A question to the target and its answer, from a server or from the target run locally."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.errors import EagleCoreError

ASKED_AGAIN = frozenset(
    {
        Reason.SERVER_ERROR,
        Reason.REQUEST_REFUSED,
        Reason.ANSWER_NOT_ENDED,
        Reason.ANSWER_PAST_END,
    }
)
"""What the server may do otherwise next time; every other outcome is final."""
_THINK_END = "</think>"
_OPENS_REASONING = re.compile(r"<(?:\w+:)?think(?:ing)?>|\[THINK\]", re.IGNORECASE)
_CLOSES_REASONING = re.compile(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A conversation up to the next assistant turn."""

    messages: tuple[Message, ...]
    tools: str
    """JSON text of the available tools; empty if there are none."""
    seed: int
    """Seed of this answer alone, so that the order of requests does not change it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer of the target."""

    message: Message
    num_tokens: int
    """Reasoning included; 0 if the server did not report it."""


class NoAnswer(EagleCoreError):  # noqa: N818 - the outcome of one question, not a fault
    """This question has no usable answer; others may have one. Survives pickling."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class AnswerSource(Protocol):
    """The target, on a server or local."""

    @property
    def concurrency(self) -> int:
        """Maximum number of questions in flight."""

    async def ask(self, question: Question) -> Answer:
        """Return the answer; raise `NoAnswer` if there is none. Other errors stop the run."""

    def identity(self) -> Mapping[str, object]:
        """Return the target's identity; with the settings, it determines the answers."""

    def ready(self) -> AbstractContextManager[None]:
        """Return a block in which it can be asked; entering may take minutes.

        It is entered only if there is a question, and outside of an event loop.
        """

    async def close(self) -> None:
        """Release connections, in the event loop that used them."""


def usable(message: Message, *, is_cut: bool) -> Message:
    """Return the answer with separate reasoning; `is_cut` says that max_tokens truncated it.

    Raises:
        NoAnswer: `ANSWER_CUT` inside the reasoning or a tool call, `EMPTY_ANSWER` without text and
            calls.

    """
    if _THINK_END in message.content and not message.reasoning_content:
        answer = message.without_reasoning()
        message = replace(answer, reasoning_content=message.reasoning)
    if is_cut and message.tool_calls:
        raise NoAnswer(Reason.ANSWER_CUT, "inside a tool call")
    only_reasoning = starts_unclosed_reasoning(message.content) or bool(message.reasoning_content)
    if is_cut and (not message.content.strip() or _leaves_reasoning_open(message.content)):
        raise NoAnswer(Reason.ANSWER_CUT, "inside the reasoning" if only_reasoning else "no text")
    has_text = message.content.strip() and not starts_unclosed_reasoning(message.content)
    if not has_text and not message.tool_calls:
        raise NoAnswer(Reason.EMPTY_ANSWER, "only reasoning" if only_reasoning else "")
    return message


def with_opened_reasoning(message: Message) -> Message:
    """Return the message with the tag that the prompt had, unless its reasoning is complete."""
    if message.reasoning_content or _CLOSES_REASONING.search(message.content):
        return message
    return replace(message, content=f"<think>{message.content}")


def starts_unclosed_reasoning(content: str) -> bool:
    """Return whether the text is reasoning from its first tag on, without an end."""
    return bool(_OPENS_REASONING.match(content.lstrip())) and _leaves_reasoning_open(content)


def _leaves_reasoning_open(content: str) -> bool:
    num_opened = len(_OPENS_REASONING.findall(content))
    return num_opened > len(_CLOSES_REASONING.findall(content))
