"""A chat template with what ends an answer in it."""

from collections.abc import Collection
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from eagle_core.errors import ConfigError
from eagle_core.tokenization.answer_end import AnswerEnd, learn_answer_end
from eagle_core.tokenization.call_content import needs_text, writes_calls
from eagle_core.tokenization.chat_template import ChatTemplate, TemplateRefusedError
from eagle_core.tokenization.config import TemplateConfig

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
        gives_text = self.template.gives_text_in_calls
        return [*ends, ""] if gives_text and writes_calls(self.template, tools=[_TOOL]) else ends


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
    if needs_text(template, tools=[_TOOL]):
        template = template.with_text_in_calls()
    try:
        tools = [_TOOL] if for_tools else None
        end = learn_answer_end(template, backend, stop_ids, tools=tools)
    except TemplateRefusedError as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} refuses one question and one answer: "
            f"{error}; set `chat_template`"
        ) from error
    return ChatFormat(template=template, end=end)
