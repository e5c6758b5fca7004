"""One turn of a record as a message."""

from collections.abc import Mapping

from eagle_core.data.conversation import Message, Role
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.records.calls import parse_call_turn, parse_tool_calls
from eagle_core.data.records.content import Content, read_content
from eagle_core.data.records.fields import Fields, Notes, encodable, holds_something, parsed
from eagle_core.data.records.loss_weight import ignore_exclusion, is_supervised
from eagle_core.data.records.roles import Speaker, speaker
from eagle_core.data.tool_calls import ToolCall

ROLE_KEYS = ("role", "from", "speaker", "sender")
_CONTENT_KEYS = ("content", "value", "text")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_FORMER_CALL_KEYS = ("function_call", "function_calls")
_NO_CALLS = ("null", "[]", "{}")


def read_turn(turn: object, *, location: str, roles: Mapping[str, Role], notes: Notes) -> Message:
    """Return the message in a turn, and note the fields that nothing reads.

    Reads role, content (text or parts), reasoning, tool calls, the call that a tool's result
    belongs to, and whether the loss counts an answer. Raises `RejectedRecord` with a reason.
    """
    turn = parsed(turn)
    if not isinstance(turn, Mapping):
        raise RejectedRecord(Reason.NOT_AN_OBJECT, location, f"found {type(turn).__name__}")
    fields = Fields(turn, within="turn.", notes=notes)
    by = _speaker(fields, roles, location)
    if by.is_call:
        message = _called(fields, location)
    elif by.role == "assistant":
        message = _answered(fields, location)
    else:
        message = _asked(fields, by.role, location)
    fields.finish()
    return message


def _speaker(fields: Fields, roles: Mapping[str, Role], location: str) -> Speaker:
    name = fields.take(*ROLE_KEYS)
    found = speaker(name, roles) if isinstance(name, str) else None
    if found is None:
        detail = f"role {str(name)[:40]!a}; `dataset.roles` can name it"
        raise RejectedRecord(Reason.UNKNOWN_ROLE, location, detail)
    return found


def _called(fields: Fields, location: str) -> Message:
    calls = parse_call_turn(fields.take(*_CONTENT_KEYS), fields, location=location)
    return Message(
        role="assistant",
        content="",
        reasoning_content=_thought(fields, location),
        tool_calls=calls,
        is_supervised=is_supervised(fields, location),
    )


def _answered(fields: Fields, location: str) -> Message:
    content = _content(fields, location, *_CONTENT_KEYS)
    if not content.text.strip() and fields.holds("refusal"):
        content = _content(fields, location, "refusal")
    thought = _thought(fields, location)
    return Message(
        role="assistant",
        content=content.text,
        reasoning_content=thought or content.reasoning,
        tool_calls=_calls(fields, location),
        is_supervised=is_supervised(fields, location),
    )


def _asked(fields: Fields, role: Role, location: str) -> Message:
    content = _content(fields, location, *_CONTENT_KEYS)
    if content.reasoning:
        raise RejectedRecord(Reason.NOT_TEXT, location, f"reasoning in a turn of {role}")
    ignore_exclusion(fields)  # the loss never counts these turns
    if role != "tool":
        return Message(role=role, content=content.text)
    return Message(
        role=role,
        content=content.text,
        name=_name(fields.take("name"), location),
        tool_call_id=_name(fields.take("tool_call_id", "call_id"), location),
    )


def _content(fields: Fields, location: str, *names: str) -> Content:
    return read_content(fields.take(*names), fields, location=location)


def _thought(fields: Fields, location: str) -> str:
    """Return the reasoning; a flag that says whether the target reasons has none."""
    flags = [name for name in _REASONING_KEYS if isinstance(fields.see(name), bool)]
    fields.ignore(*flags)
    names = (name for name in _REASONING_KEYS if name not in flags)
    return _content(fields, location, *names).text


def _calls(fields: Fields, location: str) -> tuple[ToolCall, ...]:
    """Return the calls in `tool_calls`, in OpenAI's former `function_call`, or in OLMo's field."""
    calls = parse_tool_calls(fields.take("tool_calls"), location=location, turn=fields)
    for name in () if calls else _FORMER_CALL_KEYS:
        value = fields.take(name)
        if holds_something(value) and value not in _NO_CALLS:
            return parse_call_turn(value, fields, location=location, name=name)
    return calls


def _name(value: object, location: str) -> str:
    return "" if value is None else encodable(str(value), location)
