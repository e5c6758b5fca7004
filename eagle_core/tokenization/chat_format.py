"""The chat templates of a target, each with what ends an answer in it."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from eagle_core.errors import ConfigError
from eagle_core.tokenization.answer_end import AnswerEnd, learn_answer_end
from eagle_core.tokenization.call_probes import find_forms, forms_fingerprint
from eagle_core.tokenization.chat_template import ChatTemplate, TemplateRefusedError
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.template_source import TemplateSource

_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """A chat template and what ends an answer in it."""

    template: ChatTemplate
    end: AnswerEnd

    @property
    def fingerprint(self) -> list[object]:
        """What decides on masks and calls besides the template's text, as JSON."""
        end = self.end
        ends: list[object] = [end.closing, end.ending, end.call_ending, sorted(end.token_ids)]
        # Earlier versions dropped or misread such calls; token files of other templates stay.
        return [*ends, *forms_fingerprint(self.template, tools=[_TOOL])]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormats:
    """The formats of one target: for conversations without tools and with."""

    plain: ChatFormat
    with_tools: ChatFormat

    def for_tools(self, tools: str) -> ChatFormat:
        """Return the format of a conversation with these tools, JSON text or empty."""
        return self.with_tools if tools else self.plain

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids of the tokens that end an answer in either."""
        return self.plain.end.token_ids | self.with_tools.end.token_ids

    @property
    def fingerprint(self) -> list[object]:
        """What decides on the masks besides tokenizer and plain template, as JSON."""
        formats = [self.plain.fingerprint, self.with_tools.fingerprint]
        return [self.with_tools.template.fingerprint, formats]

    def control_tokens(self, added: Collection[str]) -> set[str]:
        """Return which of the `added` tokens the templates write themselves."""
        turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        template = self.plain.template
        try:
            text = template.render(turns, add_generation_prompt=True).text
        except TemplateRefusedError:  # it takes no system turn
            text = template.render(turns[1:], add_generation_prompt=True).text
        ends: set[str] = set()
        for end in (self.plain.end, self.with_tools.end):
            text += end.closing + end.ending + end.call_ending
            ends |= {*end.tokens}
        return {token for token in added if token in text} | ends


def chat_formats(
    source: TemplateSource,
    tokenizer: PreTrainedTokenizerBase,
    config: TemplateConfig,
    *,
    backend: Tokenizer,
    stop_ids: Collection[int],
) -> ChatFormats:
    """Compile the templates and learn what ends an answer; raises as `chat_format`."""
    compiled = partial(
        chat_format, tokenizer=tokenizer, config=config, backend=backend, stop_ids=stop_ids
    )
    plain = compiled(source.default)
    with_tools = compiled(source.with_tools, for_tools=True) if source.with_tools else plain
    return ChatFormats(plain=plain, with_tools=with_tools)


def chat_format(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: TemplateConfig,
    *,
    backend: Tokenizer,
    stop_ids: Collection[int],
    for_tools: bool = False,
) -> ChatFormat:
    """Compile a template and learn what ends an answer.

    Raises:
        ConfigError: it is not valid Jinja, or refuses one question and one answer.

    """
    template = ChatTemplate(source, variables=tokenizer.special_tokens_map, today=config.date)
    template = template.with_call_forms(find_forms(template, tools=[_TOOL]))
    try:
        tools = [_TOOL] if for_tools else None
        end = learn_answer_end(template, backend, stop_ids, tools=tools)
    except TemplateRefusedError as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} refuses one question and one answer: "
            f"{error}; set `chat_template`"
        ) from error
    return ChatFormat(template=template, end=end)
