"""What a server says about an error, in one line: its message, bounded, without the API key."""

import json
from collections.abc import Mapping

_MAX_CHARS = 300


def own_words(text: str, *, secret: str | None) -> str:
    """Return the message in a response's body, or its beginning if it has another form."""
    words = " ".join(_message(text).split())
    if secret:
        words = words.replace(secret, "***")
    return words if len(words) <= _MAX_CHARS else words[:_MAX_CHARS] + "..."


def _message(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    for key in ("error", "message", "detail"):  # OpenAI's and Ollama's; vLLM's; FastAPI's
        while isinstance(found, Mapping) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
