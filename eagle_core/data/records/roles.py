"""The names that data sets give to the roles of a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass

from eagle_core.data.conversation import Role

_SYNONYMS: Mapping[Role, str] = {
    "system": "system developer system_prompt system_message",
    "user": "user human prompter prompt question query instruction input",
    "assistant": (
        "assistant gpt chatgpt bing bard model bot chatbot ai agent llm answer output response "
        "completion"
    ),
    "tool": (
        "tool function observation ipython environment function_response function_result "
        "function_output tool_response tool_result tool_results tool_output"
    ),
}
_ROLES: Mapping[str, Role] = {
    name: role for role, names in _SYNONYMS.items() for name in names.split()
}
_CALLS = frozenset({"function_call", "function_calls", "tool_call", "tool_calls"})
"""Turns of the assistant whose text is a call, or a list of calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speaker:
    """Who speaks a turn."""

    role: Role
    is_call: bool = False
    """Whether the content of the turn is tool calls in JSON."""


def speaker(name: str, roles: Mapping[str, Role]) -> Speaker | None:
    """Return who speaks under this name, or None; capitals, spaces and hyphens do not count.

    `roles` are the user's names; they take precedence over the known ones.
    """
    plain = _plain(name)
    own = {_plain(known): role for known, role in roles.items()}
    if plain in own:
        return Speaker(role=own[plain])
    if plain in _CALLS:
        return Speaker(role="assistant", is_call=True)
    role = _ROLES.get(plain)
    return None if role is None else Speaker(role=role)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")
