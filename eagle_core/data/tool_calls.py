"""Tool calls in a conversation, and the available tools, in one canonical form.

Arguments are kept as JSON text: two calls are equal if and only if their texts are. Templates get
them parsed (`ToolCall.as_openai`), as every tokenizer's template expects.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eagle_core.data.ledger import Reason, RejectedRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call that the assistant makes."""

    name: str
    arguments: str
    """JSON text; text that is not JSON is kept unchanged."""
    call_id: str = ""

    def as_openai(self) -> dict[str, object]:
        """Return the call as chat templates read it."""
        try:
            arguments = json.loads(self.arguments)
        except json.JSONDecodeError:
            arguments = self.arguments
        call: dict[str, object] = {
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }
        return call | ({"id": self.call_id} if self.call_id else {})


def parse_tool_calls(value: object, *, location: str) -> tuple[ToolCall, ...]:
    """Return the calls in an OpenAI `tool_calls` list; raise `RejectedRecord` if malformed."""
    if value in (None, "", []):
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"tool_calls is {type(value).__name__}")
    return tuple(_parse_call(call, location) for call in value)


def parse_function_call(text: str, *, location: str) -> ToolCall:
    """Return the call in a ShareGPT `function_call` turn: a JSON object with name and arguments."""
    try:
        call = json.loads(text)
    except json.JSONDecodeError as error:
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"function_call: {error.msg}") from error
    return _parse_call(call, location)


def parse_tools(value: object, *, location: str) -> str:
    """Return the available tools (a list or its JSON text) as JSON text; empty without tools."""
    if value in (None, "", []):
        return ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RejectedRecord(Reason.BAD_TOOLS, location, f"tools: {error.msg}") from error
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RejectedRecord(Reason.BAD_TOOLS, location, "tools is not a list of objects")
    return _to_json(value) if value else ""


def _parse_call(call: object, location: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise RejectedRecord(Reason.BAD_TOOLS, location, f"call is {type(call).__name__}")
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise RejectedRecord(Reason.BAD_TOOLS, location, "a call has no function name")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = _to_json(arguments)
    return ToolCall(name=name, arguments=arguments, call_id=str(call.get("id") or ""))


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
