"""A question to the target and its answer, from a server or from the target run locally."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.errors import EagleCoreError

_THINK_END = "</think>"


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

    async def close(self) -> None:
        """Release connections."""


def usable(message: Message) -> Message:
    """Return the answer with separate reasoning; raise `NoAnswer` without text and calls."""
    if _THINK_END in message.content and not message.reasoning_content:
        answer = message.without_reasoning()
        message = replace(answer, reasoning_content=message.reasoning)
    if not message.content.strip() and not message.tool_calls:
        detail = "only reasoning" if message.reasoning_content else ""
        raise NoAnswer(Reason.EMPTY_ANSWER, detail)
    return message
