"""In which form a chat template is given tool calls: what OpenAI's API leaves open.

The content of a call without text is None there, and some templates write calls only then. Others
concatenate the content, which fails, or print it, which writes "None"; servers give them ''. The
arguments are JSON text there; servers parse them for templates, and some templates need the text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CallForm:
    """The form of the calls in one conversation."""

    empty_content: str | None = None
    """Stands for the content of a call without text."""
    arguments_as_text: bool = False
    """Parsed arguments are given as JSON text, spaced as `tojson` writes them."""

    def given(self, message: Mapping[str, object]) -> Mapping[str, object]:
        """Return a message of OpenAI's form with its calls, if any, in this form."""
        changed = dict(message)
        if message.get("content", "") is None:
            changed["content"] = self.empty_content
        calls = message.get("tool_calls")
        if self.arguments_as_text and isinstance(calls, list):
            changed["tool_calls"] = [_with_text(call) for call in calls]
        return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class CallForms:
    """The forms for one template, which may write calls otherwise where tools are offered."""

    plain: CallForm = CallForm()
    with_tools: CallForm = CallForm()


def _with_text(call: Mapping[str, object]) -> Mapping[str, object]:
    function = call["function"]
    if not isinstance(function, Mapping) or isinstance(function["arguments"], str):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
