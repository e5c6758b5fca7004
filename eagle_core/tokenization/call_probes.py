"""Find the form of tool calls that a chat template takes, from renderings of short conversations.

The usual form is kept unless another loses no call, and writes one that is lost in the usual form
or has the word "None" in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from eagle_core.tokenization.call_form import CallForm, CallForms
from eagle_core.tokenization.chat_template import ChatTemplate, TemplateRefusedError

_FORMS = [
    CallForm(empty_content=content, arguments_as_text=as_text)
    for as_text, content in product((False, True), (None, ""))
]
"""The usual one first, then in order of preference."""
_USUAL = _FORMS[0]
_CALL_IDS = ("call00001", "call00002")
"""Nine characters, as Mistral's templates require."""
_QUESTION: dict[str, object] = {"role": "user", "content": "a"}
_ANSWER: dict[str, object] = {"role": "assistant", "content": "c"}
_Turns = list[dict[str, object]]
_Probe = Callable[[str | None], _Turns]
"""A conversation with calls of the named function, or with the turns alone."""
_Quality = tuple[int, int]
"""0 if refused for its content, 2 if the call is written, else 1; minus the "None" in its text."""


def find_forms(template: ChatTemplate, *, tools: Sequence[object]) -> CallForms:
    """Return the forms for conversations without tools and with, probed with these `tools`."""
    plain, with_tools = (_Qualities(template, offered) for offered in (None, tools))
    forms = CallForms(plain=plain.best(), with_tools=with_tools.best())
    if forms.plain == _USUAL and plain.is_kept(forms.with_tools):
        return replace(forms, plain=forms.with_tools)
    if forms.with_tools == _USUAL and with_tools.is_kept(forms.plain):
        return replace(forms, with_tools=forms.plain)
    return forms


def forms_fingerprint(template: ChatTemplate, *, tools: Sequence[object]) -> list[object]:
    """Return the forms of calls that the template writes, as JSON; empty for the usual one."""
    forms = template.call_forms
    kinds = ((forms.plain, None), (forms.with_tools, tools))
    written = {form for form, offered in kinds if _writes_calls(template, offered)}
    if written <= {_USUAL}:
        return []
    if written == {CallForm(empty_content="")}:
        return [""]  # whichever kinds of conversations have it
    return [[form.empty_content, form.arguments_as_text] for form, _ in kinds]


def _writes_calls(template: ChatTemplate, tools: Sequence[object] | None) -> bool:
    """Return whether the text of a call without text depends on the call."""
    return any(
        _Rendered.of(template, probe("f"), tools) != _Rendered.of(template, probe("g"), tools)
        for probe in _PROBES
    )


class _Qualities:
    """How well a template writes the calls of each probe in each form."""

    def __init__(self, template: ChatTemplate, tools: Sequence[object] | None) -> None:
        self._found: dict[CallForm, list[_Quality]] = {}
        for form in _FORMS:
            formed = template.with_call_forms(CallForms(plain=form, with_tools=form))
            self._found[form] = [_quality(formed, probe, tools) for probe in _PROBES]

    def best(self) -> CallForm:
        """Return the first of the best forms that are kept.

        Arguments are given as text only if no call with parsed ones is written: `tojson` writes
        the text, too, but as a JSON string.
        """
        parsed = [form for form in _FORMS if not form.arguments_as_text]
        is_written = any(stage == 2 for form in parsed for stage, _ in self._found[form])
        return max(
            filter(self.is_kept, parsed if is_written else _FORMS),
            key=lambda form: [sum(parts) for parts in zip(*self._found[form], strict=True)],
        )

    def is_kept(self, form: CallForm) -> bool:
        """Return whether no probe is written worse than in the usual form."""
        pairs = zip(self._found[form], self._found[_USUAL], strict=True)
        return all(quality >= usual for quality, usual in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rendered:
    """The text of a conversation, or the words with which the template refuses it."""

    text: str | None
    refusal: str = ""

    @classmethod
    def of(
        cls, template: ChatTemplate, turns: _Turns, tools: Sequence[object] | None
    ) -> "_Rendered":
        try:
            rendering = template.render(turns, tools=tools, add_generation_prompt=False)
        except TemplateRefusedError as error:
            return cls(text=None, refusal=str(error))
        return cls(text=rendering.text)


def _quality(template: ChatTemplate, probe: _Probe, tools: Sequence[object] | None) -> _Quality:
    one = _Rendered.of(template, probe("f"), tools)
    if one.text is None:  # in the same words without its calls: they are not the cause
        return int(one != _Rendered.of(template, probe(None), tools)), 0
    is_written = one != _Rendered.of(template, probe("g"), tools)
    return (2, -one.text.count("None")) if is_written else (1, 0)


def _last(name: str | None) -> _Turns:
    return [_QUESTION, _calls(name, 1)]


def _last_of_two(name: str | None) -> _Turns:
    return [_QUESTION, _calls(name, 2)]


def _with_result(name: str | None) -> _Turns:
    return [*_last(name), _result(0)]


def _two_with_results(name: str | None) -> _Turns:
    return [*_last_of_two(name), _result(0), _result(1)]


def _in_history(name: str | None) -> _Turns:
    return [*_with_result(name), _ANSWER, _QUESTION]


_PROBES: list[_Probe] = [_last, _last_of_two, _with_result, _two_with_results, _in_history]


def _result(number: int) -> dict[str, object]:
    return {"role": "tool", "content": "b", "name": "f", "tool_call_id": _CALL_IDS[number]}


def _calls(name: str | None, count: int) -> dict[str, object]:
    turn: dict[str, object] = {"role": "assistant", "content": None}
    if name is None:
        return turn
    function = {"name": name, "arguments": {"a": "b"}}
    calls = [{"type": "function", "id": one, "function": function} for one in _CALL_IDS[:count]]
    return {**turn, "tool_calls": calls}
