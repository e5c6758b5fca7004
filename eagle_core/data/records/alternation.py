"""The order of turns in a conversation: what is cut from its ends, joined, or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eagle_core.data.conversation import Message, Role
from eagle_core.data.ledger import Change, Reason, RejectedRecord

_MAY_FOLLOW: Mapping[Role | None, frozenset[Role]] = {
    None: frozenset({"system", "user"}),
    "system": frozenset({"user"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"assistant", "tool"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderedTurns:
    """Turns that follow each other, and the changes that were needed."""

    messages: tuple[Message, ...]
    changes: tuple[Change, ...]


def ordered(
    messages: Sequence[Message], *, location: str, join_turns: bool, questions_suffice: bool
) -> OrderedTurns:
    """Return the turns from the first user turn to the last assistant turn, and the system turn.

    With `questions_suffice` a user turn may be the last. With `join_turns` consecutive turns of one
    role are joined. Raises `RejectedRecord` if turns are missing, empty or in another order.
    """
    changes = []
    kept = list(messages)
    if join_turns:
        kept = _joined(kept, location)
        if len(kept) < len(messages):
            changes.append(Change.TURNS_JOINED)
    start, first = _first_question(kept)
    if first > start:
        changes.append(Change.LEADING_ASSISTANT_TURNS_CUT)
        del kept[start:first]
    last: tuple[Role, ...] = ("assistant", "user") if questions_suffice else ("assistant",)
    num_turns = len(kept)
    while kept and kept[-1].role not in last:
        kept.pop()
    if not kept:
        needed = "question" if questions_suffice else "answer"
        detail = f"{len(messages)} turns, no {needed} to learn from"
        raise RejectedRecord(Reason.NO_ASSISTANT_TURN, location, detail)
    if len(kept) < num_turns:
        changes.append(Change.TRAILING_TURNS_CUT)
    _check(kept, location)
    return OrderedTurns(messages=tuple(kept), changes=tuple(changes))


def _first_question(messages: Sequence[Message]) -> tuple[int, int]:
    """Return the place of the first question, without and with the answers before it."""
    start = 1 if messages and messages[0].role == "system" else 0
    first = start
    while first < len(messages) and messages[first].role == "assistant":
        first += 1
    return start, first


def _joined(messages: Sequence[Message], location: str) -> list[Message]:
    """Join consecutive turns of one role by an empty line; results of tools stay apart."""
    joined: list[Message] = []
    for message in messages:
        if joined and message.role == joined[-1].role and message.role != "tool":
            joined[-1] = _join(joined[-1], message, location)
        else:
            joined.append(message)
    return joined


def _join(one: Message, two: Message, location: str) -> Message:
    if one.tool_calls and (two.content.strip() or two.reasoning_content.strip()):
        detail = "a call and what is said after it cannot be one turn"
        raise RejectedRecord(Reason.WRONG_ALTERNATION, location, detail)
    if one.is_supervised != two.is_supervised:
        detail = "turns that the loss counts and does not count cannot be joined"
        raise RejectedRecord(Reason.WRONG_ALTERNATION, location, detail)
    thoughts = (one.reasoning_content, two.reasoning_content)
    return replace(
        one,
        content="\n\n".join(filter(None, (one.content, two.content))),
        reasoning_content="\n\n".join(filter(None, thoughts)),
        tool_calls=one.tool_calls + two.tool_calls,
    )


def _check(messages: Sequence[Message], location: str) -> None:
    previous: Role | None = None
    for index, message in enumerate(messages):
        if message.role not in _MAY_FOLLOW[previous]:
            raise RejectedRecord(
                Reason.WRONG_ALTERNATION,
                location,
                f"turn {index} is {message.role} after {previous or 'nothing'}",
            )
        if not message.content.strip() and not message.tool_calls:
            raise RejectedRecord(
                Reason.EMPTY_TURN, location, f"turn {index} ({message.role}) is empty"
            )
        previous = message.role
