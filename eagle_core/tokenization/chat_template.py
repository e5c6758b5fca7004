"""Render messages with the tokenizer's chat template, independent of the current date.

Uses the same sandbox as transformers, with two differences. The date is fixed: templates that print
today's date (Llama-3, gpt-oss) would otherwise give different tokens every day. And the text of
`{% generation %}` blocks is reported as character spans.
"""

import datetime as dt
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NoReturn, Self

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import meta, nodes
from jinja2.parser import Parser

from eagle_core.errors import ConfigError, EagleCoreError
from eagle_core.tokenization.call_form import CallForms

_OPEN, _CLOSE = "\x00<generation>\x00", "\x00</generation>\x00"
"""Markers around a block during rendering."""
_THINKING_NAMES = {"enable_thinking", "thinking"}
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class TemplateRefusedError(EagleCoreError):
    """The template raised an error, as many do for turns that their model was not trained on."""


PLAIN_TEMPLATE = """\
{{- bos_token or '' }}
{%- for message in messages %}
{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{- eos_token or '' }}{% endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Assistant:\\n' }}{% endif %}"""
"""For base models: headings, no special tokens except the tokenizer's begin and end of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """The rendered text of messages."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """Character spans of `{% generation %}` blocks; empty if the template has none."""


class ChatTemplate:
    """One template with everything fixed except the messages."""

    def __init__(self, source: str, *, variables: Mapping[str, object], today: dt.date) -> None:
        """Compile; `variables` are the template's inputs besides messages and tools."""
        self.call_forms = CallForms()
        self._variables = {**variables, "documents": None, "strftime_now": today.strftime}
        self._template, names = _compile(source)
        self._thinking_names = names & _THINKING_NAMES
        self.marks_generation = _GENERATION.search(source) is not None
        identity = json.dumps(
            {"source": source, "variables": dict(variables), "today": today.isoformat()},
            sort_keys=True,
            default=str,
        )
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def with_call_forms(self, forms: CallForms) -> Self:
        """Return this template, given tool calls in these forms."""
        fitted = copy(self)
        fitted.call_forms = forms
        return fitted

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[object] | None = None,
        thinking: bool | None = False,
        add_generation_prompt: bool,
    ) -> Rendering:
        """Return the text; raise `TemplateRefusedError` if the template refuses the messages.

        `thinking` is passed to templates that read it, under the name that they use. None leaves
        the choice to the template.
        """
        form = self.call_forms.with_tools if tools else self.call_forms.plain
        chosen = {} if thinking is None else dict.fromkeys(self._thinking_names, thinking)
        try:
            text = self._template.render(
                messages=[form.given(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
                **chosen,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise TemplateRefusedError(f"{type(error).__name__}: {error}") from error
        return _without_marks(text)


class _GenerationTag(jinja2.ext.Extension):
    """Implements `{% generation %}...{% endgeneration %}`: renders its text between two markers."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _compile(source: str) -> tuple[jinja2.Template, set[str]]:
    """Return the template and the names of the variables it reads."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), names
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not valid Jinja (line {error.lineno}): {error}; correct it"
        ) from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers writes it for templates: no HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _without_marks(text: str) -> Rendering:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for number, piece in enumerate(text.split(_OPEN)):
        block, mark, rest = piece.partition(_CLOSE)
        if bool(mark) != (number > 0):
            raise TemplateRefusedError("generation blocks overlap, or a message contains a marker")
        if number > 0:
            spans.append((length, length + len(block)))
        pieces += (block, rest)
        length += len(block) + len(rest)
    return Rendering(text="".join(pieces), generated=tuple(spans))
