"""Which chat template a conversation is rendered with: the tokenizer's, a file's, or a given text.

A tokenizer may have several named templates. Servers render with `tool_use` where a request has
tools and there is one, and with `default` otherwise; so does this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from eagle_core.errors import ConfigError
from eagle_core.tokenization.chat_template import PLAIN_TEMPLATE
from eagle_core.tokenization.config import TemplateConfig

_JINJA = ("{{", "{%")
_MAX_PATH_CHARACTERS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateSource:
    """The text of the templates of one tokenizer."""

    default: str
    with_tools: str | None = None
    """For conversations with tools, if that is another template."""


def template_source(tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> TemplateSource:
    """Return the configured template, or the tokenizer's.

    Raises:
        ConfigError: there is none, or the configured text is neither a file nor Jinja.

    """
    configured = configured_text(config)
    if configured is not None:
        return TemplateSource(default=configured)
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        return _named(own, str(tokenizer.name_or_path))
    if not own:
        raise ConfigError(_without(str(tokenizer.name_or_path)))
    return TemplateSource(default=own)


def configured_text(config: TemplateConfig) -> str | None:
    """Return the text of the configured template; None if the tokenizer's own is to be used.

    Raises:
        ConfigError: it is neither a file nor Jinja.

    """
    if config.chat_template == "plain":
        return PLAIN_TEMPLATE
    return _configured(config.chat_template) if config.chat_template else None


def _named(own: Mapping[str, str], name: str) -> TemplateSource:
    if own and not own.get("default"):
        raise ConfigError(
            f"the tokenizer {name} has the chat templates {', '.join(sorted(own))} but no "
            "`default`; set `chat_template` to the one to use"
        )
    if not own:
        raise ConfigError(_without(name))
    return TemplateSource(default=own["default"], with_tools=own.get("tool_use"))


def _without(name: str) -> str:
    return (
        f"the tokenizer {name} has no chat template; set `chat_template`, or use the "
        "instruction-tuned model"
    )


def _configured(text: str) -> str:
    """Return the Jinja text that `chat_template` gives, itself or as the path of a file."""
    if any(mark in text for mark in _JINJA):
        return text
    shown = " ".join(text.split())[:80]
    if len(text) <= _MAX_PATH_CHARACTERS and "\n" not in text.strip():
        path = Path(text.strip()).expanduser()
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat_template {str(path)!r} is neither Jinja text nor a file that can be read "
                f"({type(error).__name__}); correct the path, or give the template itself"
            ) from error
        if any(mark in found for mark in _JINJA):
            return found
        raise ConfigError(f"{path} has no Jinja in it ({{{{ or {{%): it is not a chat template")
    raise ConfigError(
        f"chat_template {shown!r} has no Jinja in it ({{{{ or {{%): every conversation would be "
        "rendered as the same text; give the template, the path of its file, or `plain`"
    )
