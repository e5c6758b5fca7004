"""Whether a server's text goes on after the end of the assistant's turn.

A server that does not know the target's stop token lets it write the next turns as well, and calls
that an answer. Special tokens betray it; where the server hides them, the role names between them.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.regeneration.answers import NoAnswer
from eagle_core.target.config import TargetConfig

_MARKERS = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|eot|eom|start_header_id|end_of_text|endoftext|end"
    r"|start|return|user|assistant|system|observation|end_of_turn|turn_end)\|>"
    r"|<(?:start|end)_of_turn>|<\uff5c(?:User|Assistant|end\u2581of\u2581sentence)\uff5c>"
)
"""Markers of turns that stand for nothing else, whatever the target is."""
_USER_LINE = re.compile(r"^[ \t]*(?:user|human)[ \t]*$", re.MULTILINE)
_ASSISTANT_LINE = re.compile(r"^[ \t]*(?:assistant|model)[ \t]*$", re.MULTILINE)
"""One after the other, they are the next turns without their special tokens."""
_ORDINARY = {"unk", "pad", "mask"}
"""Special tokens that an answer may well write about, and that end nothing."""


def require_one_turn(message: Message, special_tokens: Collection[str]) -> None:
    """Raise `NoAnswer` if the answer contains a special token or another turn."""
    for text in (message.content, message.reasoning_content):
        if found := _MARKERS.search(text):
            raise NoAnswer(Reason.ANSWER_PAST_END, f"the answer contains {found[0]}")
        if token := next((token for token in special_tokens if token in text), None):
            raise NoAnswer(Reason.ANSWER_PAST_END, f"the answer contains {token}")
        user_line = _USER_LINE.search(text)
        if user_line and _ASSISTANT_LINE.search(text, user_line.end()):
            raise NoAnswer(Reason.ANSWER_PAST_END, "the answer contains further turns")


def special_tokens(target: TargetConfig) -> tuple[str, ...]:
    """Return the target's special tokens if its tokenizer is on this machine; else nothing.

    Nothing is downloaded: the target runs elsewhere.
    """
    path = _tokenizer_path(target)
    if path is None:
        return ()
    try:
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    except (OSError, ValueError, AttributeError):  # damaged: tokenising will name it
        return ()
    found = {str(token["content"]) for token in added if token.get("special")}
    return tuple(sorted(token for token in found if _is_marker(token)))


def _is_marker(token: str) -> bool:
    return not token[:1].isalnum() and token.strip("<[|]>").lower() not in _ORDINARY


def _tokenizer_path(target: TargetConfig) -> Path | None:
    path = Path(target.model).expanduser() / "tokenizer.json"
    if path.is_file():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", target.model):
        return None
    cached = try_to_load_from_cache(target.model, path.name, revision=target.revision)
    return Path(cached) if isinstance(cached, str) else None
