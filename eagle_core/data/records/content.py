"""The content of a turn: text, or a list of parts of text, reasoning and refusals."""

from collections.abc import Mapping
from dataclasses import dataclass

from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.records.fields import Fields, encodable, holds_something, is_list

_TEXT = frozenset(
    {
        *("text", "input_text", "output_text", "summary_text", "refusal"),
        *("markdown", "md", "paragraph", "html", "code", "plain", "plain_text", "string"),
    }
)
_TEXT_KEYS = ("text", "refusal", "content", "value")
_REASONING = frozenset({"reasoning", "thinking", "thought", "reasoning_text"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a turn says."""

    text: str
    reasoning: str = ""
    """From parts of type `reasoning` or `thinking`."""


def read_content(value: object, turn: Fields, *, location: str) -> Content:
    """Return text and reasoning of a content.

    Raises `RejectedRecord` for images, audio and other parts that are not text.
    """
    if not is_list(value):
        return Content(text=read_text(value, location=location))
    parts = [_part(part, turn, location) for part in value]
    return Content(
        text="".join(part.text for part in parts),
        reasoning="\n".join(part.reasoning for part in parts if part.reasoning),
    )


def read_text(value: object, *, location: str) -> str:
    """Return a text, empty for null and {}; raise `RejectedRecord` for anything else."""
    if value is None or (isinstance(value, Mapping) and not holds_something(value)):
        return ""
    if isinstance(value, str):
        return encodable(value, location)
    raise RejectedRecord(Reason.NOT_TEXT, location, f"content is {type(value).__name__}")


def _part(part: object, turn: Fields, location: str) -> Content:
    if not isinstance(part, Mapping):
        raise RejectedRecord(Reason.NOT_TEXT, location, f"content part {type(part).__name__!a}")
    fields = turn.inner(part, "content")
    named = fields.take("type")
    if named is None and not isinstance(fields.see("text"), str):
        raise RejectedRecord(Reason.NOT_TEXT, location, "content part without type and text")
    kind = str(named or "text").strip().lower()
    if kind in _TEXT:
        if not any(map(fields.holds, _TEXT_KEYS)) and fields.unread():
            detail = f"content part {kind[:40]!a} has no text, but {fields.unread()[0][:40]!a}"
            raise RejectedRecord(Reason.NOT_TEXT, location, detail)
        found = Content(text=_text_of(fields, location, *_TEXT_KEYS))
    elif kind in _REASONING:
        names = ("reasoning", "thinking", "thought", "text", "content", "summary")
        found = Content(text="", reasoning=_text_of(fields, location, *names))
    else:
        raise RejectedRecord(Reason.NOT_TEXT, location, f"content part {kind[:40]!a}")
    fields.finish()
    return found


def _text_of(fields: Fields, location: str, *names: str) -> str:
    """Return the text of a part; it may be parts of text itself, as in reasoning summaries."""
    value = fields.take(*names)
    if is_list(value):
        return read_content(value, fields, location=location).text
    return read_text(value, location=location)
