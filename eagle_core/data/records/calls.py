"""Read tool calls and the available tools from the fields that data sets have for them."""

import json
from collections.abc import Mapping

from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.records.fields import (
    Fields,
    Notes,
    encodable,
    holds_something,
    is_list,
    parsed,
    without_nulls,
)
from eagle_core.data.tool_calls import ToolCall

_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_HARMLESS_KEYS = frozenset({"type", "index", "status", "call_id", "tool_call_id"})
"""Members of a call that hold no arguments under whatever name."""


def parse_tool_calls(
    value: object, *, location: str, turn: Fields | None = None
) -> tuple[ToolCall, ...]:
    """Return the calls in an OpenAI `tool_calls` list or its JSON text.

    Fields of the calls that nothing reads are noted as those of `turn`. Raises `RejectedRecord` if
    the calls are malformed.
    """
    turn = turn or Fields({}, notes=Notes())
    value = parsed(value.strip() if isinstance(value, str) else value)
    if value in (None, "", "null", [], {}):
        return ()
    if not is_list(value):
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"tool_calls is {type(value).__name__}")
    return tuple(_parse_call(call, turn, location) for call in value)


def parse_call_turn(
    value: object, turn: Fields, *, location: str, name: str = "function_call"
) -> tuple[ToolCall, ...]:
    """Return the calls in a `function_call`: an object with name and arguments, or a list of them.

    It may be JSON text. Fields of the calls that nothing reads are noted as those of `turn`. Errors
    call the value `name`.
    """
    if isinstance(value, str):
        value = _loaded(value, name, location)
    calls = value if is_list(value) else [value]
    if not calls:
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"{name} is an empty list")
    return tuple(_parse_call(call, turn, location) for call in calls)


def parse_tools(record: Fields, *, location: str) -> str:
    """Return the tools of a record (a list or its JSON text) as JSON text; empty without tools.

    `functions` is OpenAI's former field: the same objects without their `type`.
    """
    value = _tool_list(record.take("tools"), "tools", location)
    if not value and record.holds("functions"):
        functions = _tool_list(record.take("functions"), "functions", location)
        value = [{"type": "function", "function": function} for function in functions]
    return _to_json(value, record.notes, location) if value else ""


def _tool_list(value: object, name: str, location: str) -> list[object]:
    if isinstance(value, str):
        value = _loaded(value, name, location) if value.strip() else None
    if value in (None, "", [], {}):
        return []
    if not is_list(value) or not all(isinstance(tool, Mapping) for tool in value):
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"{name} is not a list of objects")
    return list(value)


def _loaded(text: str, name: str, location: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"{name}: {error}") from error


def _parse_call(call: object, turn: Fields, location: str) -> ToolCall:
    call = parsed(call)
    if not isinstance(call, Mapping):
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"call is {type(call).__name__}")
    outer = turn.inner(call, "tool_calls")
    outer.ignore("type")
    call_id = outer.take("id", "call_id", "tool_call_id")
    function = parsed(outer.take("function")) if outer.holds("function") else None
    inner = turn.inner(function, "tool_calls.function") if isinstance(function, Mapping) else outer
    name = inner.take("name")
    if not isinstance(name, str) or not name:
        raise RejectedRecord(Reason.BAD_TOOLS, location, "a call has no function name")
    arguments = _arguments(inner, outer, location)
    if not isinstance(arguments, str):
        arguments = _to_json({} if arguments is None else arguments, turn.notes, location)
    inner.finish()
    outer.finish()
    return ToolCall(
        name=encodable(name, location),
        arguments=encodable(arguments, location),
        call_id="" if call_id is None else encodable(str(call_id), location),
    )


def _arguments(function: Fields, call: Fields, location: str) -> object:
    """Return the arguments of a call, under any name; None if it has none.

    Raises `RejectedRecord` if they may be in a member that is not known.
    """
    arguments = function.take(*_ARGUMENT_KEYS)
    if not holds_something(arguments) and function is not call:
        arguments = call.take(*_ARGUMENT_KEYS) or arguments
    if holds_something(arguments):
        return arguments
    others = sorted({*function.unread(), *call.unread()} - _HARMLESS_KEYS)
    if others:
        detail = f"a call without arguments has {others[0][:40]!a}; `arguments` is expected"
        raise RejectedRecord(Reason.BAD_TOOLS, location, detail)
    return arguments


def _to_json(value: object, notes: Notes, location: str) -> str:
    """Return JSON text without null members: tables fill absent members with null."""
    filled = without_nulls(value)
    try:
        text = json.dumps(filled, ensure_ascii=False)
        notes.null_members = notes.null_members or text != json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # a Parquet file's dates and bytes
        raise RejectedRecord(Reason.BAD_TOOLS, location, str(error)) from error
    return encodable(text, location)
