"""The turns of a conversation that the target answers, and the conversation with its answers.

Questions suffice: a conversation that ends with the user's turn, or has no other, is answered too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from eagle_core.data.conversation import Conversation, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenTurn:
    """A turn that the target has to fill."""

    index: int
    """Position among the conversation's messages."""
    asked: tuple[Message, ...]
    """Messages since the answer before it."""


def open_turns(conversation: Conversation) -> Iterator[OpenTurn]:
    """Yield the assistant's turns, and the one after a last turn of the user's.

    They end before a tool's result: it belongs to a call that the target did not make.
    """
    asked: list[Message] = []
    for index, message in enumerate(conversation.messages):
        if message.role == "tool":
            return
        if message.role != "assistant":
            asked.append(message)
            continue
        yield OpenTurn(index=index, asked=tuple(asked))
        asked.clear()
    if asked and asked[-1].role == "user":
        yield OpenTurn(index=len(conversation.messages), asked=tuple(asked))


def with_answers(conversation: Conversation, answers: Sequence[Message]) -> Conversation | None:
    """Return the conversation up to its last new answer; None if there is no answer."""
    messages: list[Message] = []
    for turn, answer in zip(open_turns(conversation), answers, strict=False):
        messages += [*turn.asked, answer]
    return replace(conversation, messages=tuple(messages)) if messages else None


def up_to_last_answer(conversation: Conversation) -> Conversation:
    """Return the conversation without what follows its last assistant turn."""
    messages = list(conversation.messages)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return replace(conversation, messages=tuple(messages))
