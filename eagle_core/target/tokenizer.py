"""The tokenizer of a target, with its chat template and the tokens on which a server stops."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from eagle_core.errors import ConfigError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.folder_state import FolderState
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.template_source import configured_text


def conversation_tokenizer(target: TargetConfig) -> ConversationTokenizer:
    """Return the target's own tokenizer, with its own chat template or the configured one.

    Made once per process, until a file of it changes: every stage of a flow asks for it.

    Raises:
        ConfigError: it cannot be loaded, is slow, has no usable template, or nothing ends an
            answer.

    """
    folder = weights.locate_description(target)
    return _made(target, FolderState.of(folder), configured_text(target.template))


@lru_cache(maxsize=2)
def _made(
    target: TargetConfig,
    state: FolderState,
    _template: str | None,  # the file that `target` names may have other text than before
) -> ConversationTokenizer:
    folder = state.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=target.trust_remote_code
        )
    except Exception as error:  # a tokenizer's files can make its libraries raise anything
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"target {target.name}: the tokenizer in {folder} cannot be loaded "
            f"({type(error).__name__}: {reason}); download tokenizer.json and "
            "tokenizer_config.json again"
        ) from error
    return ConversationTokenizer(tokenizer, target.template, declared_stop_ids(folder))


def declared_stop_ids(folder: Path) -> frozenset[int]:
    """Return the ids that generation_config.json and config.json name as the end of a text.

    Read from the files: where config.json has none, transformers fills in the default of the
    architecture, which may be any token of this tokenizer.
    """
    generation, model = (_read(folder / name) for name in ("generation_config.json", "config.json"))
    text = model.get("text_config")
    found = [generation, model, text if isinstance(text, dict) else {}]
    return frozenset(number for one in found for number in _ids(one.get("eos_token_id")))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}, not an object; download it again")
    return found


def _ids(value: object) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [one for one in listed if isinstance(one, int) and not isinstance(one, bool)]
