"""A question to the target and its answer, whoever gives it: a server, or the target here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.errors import EagleCoreError

_THINK_END = "</think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A conversation up to where the assistant is due."""

    messages: tuple[Message, ...]
    tools: str
    """JSON text of the tools on offer; empty if there are none."""
    seed: int
    """Of this answer alone, so that no order of asking changes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the target said."""

    message: Message
    num_tokens: int
    """Reasoning included; 0 if the server did not say."""


class NoAnswer(EagleCoreError):  # noqa: N818 - the outcome of one question, not a fault
    """This question has no usable answer; others may. Survives pickling."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class AnswerSource(Protocol):
    """The target, wherever it runs."""

    @property
    def concurrency(self) -> int:
        """Questions that may be open at a time."""

    async def ask(self, question: Question) -> Answer:
        """Return the answer; raise `NoAnswer` if there is none, other errors to stop altogether."""

    def identity(self) -> Mapping[str, object]:
        """Return what names the target that answers; with the settings it decides the answers."""

    async def close(self) -> None:
        """Let go of connections."""


def usable(message: Message) -> Message:
    """Return the answer with reasoning apart; raise `NoAnswer` if nothing is said or called."""
    if _THINK_END in message.content and not message.reasoning_content:
        apart = message.without_reasoning()
        message = replace(apart, reasoning_content=message.reasoning)
    if not message.content.strip() and not message.tool_calls:
        detail = "reasoning alone" if message.reasoning_content else ""
        raise NoAnswer(Reason.EMPTY_ANSWER, detail)
    return message
