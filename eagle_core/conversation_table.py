"""Conversations as rows of a Parquet table."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_core.conversations import Conversation, Message
from eagle_core.tool_calls import ToolCall

_TOOL_CALL = pa.struct([(name, pa.string()) for name in ("name", "arguments", "call_id")])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("tool_calls", pa.list_(_TOOL_CALL)),
    ]
)
CONVERSATION_SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("content_key", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.string()),
    ]
)
_ROWS_PER_GROUP = 1024


def to_row(conversation: Conversation, content_key: str) -> dict[str, object]:
    """Return the row of a conversation."""
    return {
        "conversation_id": conversation.conversation_id,
        "content_key": content_key,
        "messages": [asdict(message) for message in conversation.messages],
        "tools": conversation.tools,
    }


def from_row(row: dict[str, Any]) -> Conversation:
    """Return the conversation in a row."""
    return Conversation(
        conversation_id=row["conversation_id"],
        messages=tuple(map(_message, row["messages"])),
        tools=row["tools"],
    )


class RowWriter:
    """Writes rows to a Parquet file, a row group in memory at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema
        self._rows: list[dict[str, object]] = []

    def add(self, row: dict[str, object]) -> None:
        """Take one row."""
        self._rows.append(row)
        if len(self._rows) >= _ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _message(row: dict[str, Any]) -> Message:
    return Message(
        role=row["role"],
        content=row["content"],
        reasoning_content=row["reasoning_content"],
        tool_calls=tuple(ToolCall(**call) for call in row["tool_calls"]),
    )
