"""Normalise conversations of all supported record formats into one form.

A conversation is an optional system turn, then alternating user and assistant turns (tool results
may come between two assistant turns), and ends with the assistant. A record that does not fit this
form raises `RejectedRecord`; nothing is guessed and nothing is silently repaired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eagle_core.data.columns import Columns, as_turns
from eagle_core.data.conversation import Conversation, Message, Role, content_key
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.data.tool_calls import (
    parse_function_call,
    parse_tool_calls,
    parse_tools,
)

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


_MAY_FOLLOW: Mapping[Role | None, frozenset[Role]] = {
    None: frozenset({"system", "user"}),
    "system": frozenset({"user"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"assistant", "tool"}),
}


_MESSAGE_KEYS = ("conversations", "conversation", "messages")
_ID_KEYS = ("id", "conversation_id", "prompt_id", "uuid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalised:
    """A conversation and the changes that were needed."""

    conversation: Conversation
    changes: tuple[Change, ...]


def normalise(
    record: object,
    *,
    location: str,
    columns: Columns | None = None,
    rendered_text: str | None = None,
) -> Normalised:
    """Return the conversation in a ShareGPT, OpenAI, question-and-answer or rendered record.

    ShareGPT turns have `from` and `value`, OpenAI's `role` and `content`. `columns` names question
    and answer; without it, the usual names apply if there is no list of turns. `rendered_text`
    names the column of a text that a chat template rendered.

    Two changes are made, and reported in `changes`. Assistant turns before the first user turn are
    cut: the question that they answer is missing. Turns after the last assistant turn are cut:
    nothing in them is supervised. Raises `RejectedRecord` with a reason for everything else.
    """
    if not isinstance(record, Mapping):
        raise RejectedRecord(Reason.NOT_AN_OBJECT, location, f"found {type(record).__name__}")
    if rendered_text is not None:
        conversation = Conversation(
            conversation_id=_record_id(record, location),
            messages=(),
            rendered_text=_rendered(record, rendered_text, location),
            location=location,
        )
        return Normalised(conversation=_with_id(conversation), changes=())
    messages = [
        _message(turn, location=f"{location}, turn {index}")
        for index, turn in enumerate(_turns(record, columns, location))
    ]
    kept, changes = _cut_ends(messages)
    if not any(message.role == "assistant" for message in kept):
        raise RejectedRecord(Reason.NO_ASSISTANT_TURN, location, f"{len(messages)} turns")
    _check_turns(kept, location)
    conversation = Conversation(
        conversation_id=_record_id(record, location),
        messages=tuple(kept),
        tools=parse_tools(record.get("tools"), location=location),
        location=location,
    )
    return Normalised(conversation=_with_id(conversation), changes=changes)


def _record_id(record: Mapping[str, object], location: str) -> str:
    """Return the id of the record; empty if it has none."""
    named = next((record[key] for key in _ID_KEYS if record.get(key) not in (None, "")), None)
    return _encodable(str(named), location) if named is not None else ""


def _with_id(conversation: Conversation) -> Conversation:
    if conversation.conversation_id:
        return conversation
    return replace(conversation, conversation_id=content_key(conversation))


def _rendered(record: Mapping[str, object], column: str, location: str) -> str:
    text = record.get(column)
    if text is None:
        found = ", ".join(sorted(map(str, record))[:8])
        raise RejectedRecord(Reason.NO_MESSAGES, location, f"no column {column}; found {found}")
    if not isinstance(text, str):
        raise RejectedRecord(Reason.NOT_TEXT, location, f"{column} is {type(text).__name__}")
    if not text.strip():
        raise RejectedRecord(Reason.EMPTY_TURN, location, f"{column} is empty")
    return _encodable(text, location)


def _turns(
    record: Mapping[str, object], columns: Columns | None, location: str
) -> Sequence[object]:
    for key in () if columns else _MESSAGE_KEYS:
        turns = record.get(key)
        if isinstance(turns, Sequence) and not isinstance(turns, str | bytes):
            if not turns:
                raise RejectedRecord(Reason.NO_MESSAGES, location, f"{key} is empty")
            return turns
    pair = as_turns(record, columns)
    if pair is not None:
        return pair
    found = ", ".join(sorted(map(str, record))[:8])
    raise RejectedRecord(Reason.NO_MESSAGES, location, f"neither turns nor question; found {found}")


def _message(turn: object, *, location: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RejectedRecord(Reason.NOT_AN_OBJECT, location, f"found {type(turn).__name__}")
    name = _first(turn, "role", "from")
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RejectedRecord(Reason.UNKNOWN_ROLE, location, f"role {str(name)[:40]!a}")
    content = _text(_first(turn, "content", "value"), location)
    if name == "function_call":
        call = parse_function_call(content, location=location)
        return Message(role=role, content="", tool_calls=(call,))
    if role != "assistant":
        return Message(role=role, content=content)
    return Message(
        role=role,
        content=content,
        reasoning_content=_text(_first(turn, "reasoning_content", "reasoning"), location),
        tool_calls=parse_tool_calls(turn.get("tool_calls"), location=location),
    )


def _first(turn: Mapping[str, object], *names: str) -> object:
    """Return the first field that is not None: tables fill absent fields with null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _text(content: object, location: str) -> str:
    if isinstance(content, str):
        return _encodable(content, location)
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        return "".join(_part_text(part, location) for part in content)
    raise RejectedRecord(Reason.NOT_TEXT, location, f"content is {type(content).__name__}")


def _part_text(part: object, location: str) -> str:
    """Return the text of one OpenAI content part; images and audio are refused."""
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return _encodable(part["text"], location)
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RejectedRecord(Reason.NOT_TEXT, location, f"content part {str(kind)[:40]!a}")


def _encodable(text: str, location: str) -> str:
    """Return `text`; refuse half a surrogate pair: JSON can escape it, UTF-8 cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RejectedRecord(
            Reason.BROKEN_UTF8, location, f"lone surrogate at character {error.start}"
        ) from error
    return text


def _cut_ends(messages: Sequence[Message]) -> tuple[list[Message], tuple[Change, ...]]:
    """Return the turns from the first user turn to the last assistant turn, and the system turn."""
    changes = []
    start = 1 if messages[0].role == "system" else 0
    first = start
    while first < len(messages) and messages[first].role == "assistant":
        first += 1
    kept = [*messages[:start], *messages[first:]]
    if first > start:
        changes.append(Change.LEADING_ASSISTANT_TURNS_CUT)
    end = len(kept)
    while end > 0 and kept[end - 1].role != "assistant":
        end -= 1
    if end < len(kept):
        changes.append(Change.TRAILING_TURNS_CUT)
    return kept[:end], tuple(changes)


def _check_turns(messages: Sequence[Message], location: str) -> None:
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
