"""What stands for the content of a call without text: None, or '' where a template needs text.

OpenAI's form is None, and some templates write calls only then (DeepSeek V3). Others concatenate
the content, which fails, or print it, which writes "None". Servers give such templates ''.
"""

from collections.abc import Mapping, Sequence
from itertools import product

from eagle_core.tokenization.chat_template import ChatTemplate, TemplateRefusedError

_CALL_ID = "call00001"
"""Nine characters, as Mistral's templates require."""
_QUESTION = {"role": "user", "content": "a"}
_RESULT = {"role": "tool", "content": "b", "name": "f", "tool_call_id": _CALL_ID}
_Turns = Sequence[Mapping[str, object]]


def needs_text(template: ChatTemplate, *, tools: Sequence[object]) -> bool:
    """Return whether None as the content of a call is refused or printed, and '' is not.

    A call is probed as the last turn and before its result, with `tools` offered and without.
    """
    for behind, offered in product(([], [_RESULT]), (None, tools)):
        empty = _rendered(template, [_call("f", ""), *behind], offered)
        if empty is None:
            continue
        without = _rendered(template, [_call("f", None), *behind], offered)
        if without is None or without.count("None") > empty.count("None"):
            return True
    return False


def writes_calls(template: ChatTemplate, *, tools: Sequence[object]) -> bool:
    """Return whether the text of a call without text depends on the call."""
    return any(
        _rendered(template, [_call("f", None), *behind], offered)
        != _rendered(template, [_call("g", None), *behind], offered)
        for behind, offered in product(([], [_RESULT]), (None, tools))
    )


def _rendered(template: ChatTemplate, turns: _Turns, tools: Sequence[object] | None) -> str | None:
    """Return a question with these turns behind it; None if the template refuses them."""
    try:
        rendering = template.render([_QUESTION, *turns], tools=tools, add_generation_prompt=False)
    except TemplateRefusedError:
        return None
    return rendering.text


def _call(name: str, content: str | None) -> dict[str, object]:
    function = {"name": name, "arguments": {"a": "b"}}
    call = {"type": "function", "id": _CALL_ID, "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}
