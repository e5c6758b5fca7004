"""Conversations as rows of a Parquet table."""

from typing import Any

import pyarrow as pa

from eagle_core.data.conversation import Conversation, Message, TokenRow
from eagle_core.data.tool_calls import ToolCall

_TOOL_CALL = pa.struct([(name, pa.string()) for name in ("name", "arguments", "call_id")])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("tool_calls", pa.list_(_TOOL_CALL)),
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("is_supervised", pa.bool_()),
    ]
)
_MESSAGE_NAMES = tuple(field.name for field in _MESSAGE)
CONVERSATION_SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("content_key", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.string()),
        ("rendered_text", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("location", pa.string()),
    ]
)


def to_row(conversation: Conversation, content_key: str) -> dict[str, object]:
    """Return the row of a conversation."""
    return {
        "conversation_id": conversation.conversation_id,
        "content_key": content_key,
        "messages": [_message_row(message) for message in conversation.messages],
        "tools": conversation.tools,
        "rendered_text": conversation.rendered_text,
        "input_ids": conversation.tokens and conversation.tokens.input_ids,
        "loss_mask": conversation.tokens and conversation.tokens.loss_mask,
        "location": conversation.location,
    }


def from_row(row: dict[str, Any]) -> Conversation:
    """Return the conversation in a row."""
    return Conversation(
        conversation_id=row["conversation_id"],
        messages=tuple(map(_message, row["messages"])),
        tools=row["tools"],
        rendered_text=row["rendered_text"],
        tokens=_tokens(row),
        location=row.get("location") or "",  # earlier versions did not write it
    )


def _tokens(row: dict[str, Any]) -> TokenRow | None:
    if row.get("input_ids") is None:  # earlier versions had no such column
        return None
    return TokenRow(input_ids=tuple(row["input_ids"]), loss_mask=tuple(row["loss_mask"]))


def _message_row(message: Message) -> dict[str, object]:
    """Return the fields of a message; `asdict` copies deeply and took a third of the time."""
    row: dict[str, object] = {name: getattr(message, name) for name in _MESSAGE_NAMES}
    row["tool_calls"] = [
        {"name": call.name, "arguments": call.arguments, "call_id": call.call_id}
        for call in message.tool_calls
    ]
    return row


def _message(row: dict[str, Any]) -> Message:
    return Message(
        role=row["role"],
        content=row["content"],
        reasoning_content=row["reasoning_content"],
        tool_calls=tuple(ToolCall(**call) for call in row["tool_calls"]),
        name=row.get("name") or "",  # these three were not written before rules 5
        tool_call_id=row.get("tool_call_id") or "",
        is_supervised=row.get("is_supervised", True),
    )
