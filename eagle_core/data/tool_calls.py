"""Tool calls in a conversation, and the available tools, in one canonical form.

Arguments are kept as JSON text: two calls are equal if and only if their texts are. Templates get
them parsed (`ToolCall.as_openai`), as most expect (see `tokenization/call_form.py`).
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call that the assistant makes."""

    name: str
    arguments: str
    """JSON text; text that is not JSON, or that Python cannot parse, is kept unchanged."""
    call_id: str = ""

    def as_openai(self) -> dict[str, object]:
        """Return the call as chat templates read it."""
        try:
            arguments = json.loads(self.arguments)
        except (ValueError, RecursionError):  # ValueError also for an integer of too many digits
            arguments = self.arguments
        call: dict[str, object] = {
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }
        return call | ({"id": self.call_id} if self.call_id else {})
