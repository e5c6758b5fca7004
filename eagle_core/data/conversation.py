"""A conversation: turns in order, ending with an answer, or with a question that asks for one."""

import json
from dataclasses import astuple, dataclass, field, replace
from typing import Literal, Self

import numpy as np
import xxhash

from eagle_core.data.tool_calls import ToolCall

Role = Literal["system", "user", "assistant", "tool"]
_THINK_END = "</think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    reasoning_content: str = ""
    """The assistant's reasoning before `content`."""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    """Of the function whose result a tool turn is."""
    tool_call_id: str = ""
    """The call that a tool turn answers."""
    is_supervised: bool = True
    """False for an answer that its record excludes from the loss (`weight: 0`, `train: false`)."""

    @property
    def reasoning(self) -> str:
        """The reasoning, from `reasoning_content` or between think tags in the content."""
        if self.reasoning_content or _THINK_END not in self.content:
            return self.reasoning_content
        return self.content.partition(_THINK_END)[0].strip().removeprefix("<think>").strip()

    def without_reasoning(self) -> Self:
        """Return the message with only the answer."""
        answer = self.content
        if self.role == "assistant" and _THINK_END in answer:
            answer = answer.partition(_THINK_END)[2].lstrip("\n")
        return replace(self, content=answer, reasoning_content="")

    def as_openai(self) -> dict[str, object]:
        """Return the message as chat templates read it; gpt-oss reads reasoning as `thinking`."""
        message: dict[str, object] = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = message["thinking"] = self.reasoning_content
        if self.tool_calls:
            message["content"] = self.content or None
            message["tool_calls"] = [call.as_openai() for call in self.tool_calls]
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """Token ids that a record holds instead of turns, and which of them the target wrote."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns in order, or the text that a chat template rendered, or token ids.

    The assistant's turn is the last, or a user's in a data set of questions for a target.

    Tokenisation, where the template is known, parses such a text back into turns.
    """

    conversation_id: str
    messages: tuple[Message, ...]
    tools: str = ""
    """JSON text of the available tools; empty if there are none."""
    rendered_text: str = ""
    """Set instead of `messages`."""
    tokens: TokenRow | None = None
    """Set instead of `messages`."""
    location: str = field(default="", compare=False)
    """Source file and record; empty in a data set of an earlier version."""


def content_key(conversation: Conversation) -> str:
    """Return the xxh3_128 of all turns, 32 hex digits: equal if and only if the turns are."""
    digest = xxhash.xxh3_128()
    for message in conversation.messages:
        content = message.content.encode()
        digest.update(f"{message.role} {len(content)}\n".encode())  # the length separates the turns
        digest.update(content)
        if message.reasoning_content or message.tool_calls:
            calls = [astuple(call) for call in message.tool_calls]
            digest.update(b"\n" + json.dumps([message.reasoning_content, calls]).encode())
        if message.name or message.tool_call_id:
            digest.update(b"\nof " + json.dumps([message.name, message.tool_call_id]).encode())
        if not message.is_supervised:
            digest.update(b"\nunsupervised")
    if conversation.tools:
        digest.update(b"\ntools " + conversation.tools.encode())
    if conversation.rendered_text:
        digest.update(b"\ntext " + conversation.rendered_text.encode())
    if conversation.tokens:
        digest.update(b"\ntokens " + np.array(conversation.tokens.input_ids, np.int32).tobytes())
        digest.update(np.array(conversation.tokens.loss_mask, np.bool_).tobytes())
    return digest.hexdigest()
