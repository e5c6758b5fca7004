"""A target and a draft, and how an engine serves them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eagle_core.target.config import TargetConfig

EngineName = Literal["vllm", "llamacpp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What an engine serves, and for how many texts at a time."""

    target: TargetConfig
    """Its dtype is decided."""
    weights: Path
    """Folder of the target."""
    draft: Path | None = None
    """Folder of layout `serving`, or the file of layout `gguf`; None decodes plainly."""
    draft_tokens: int = 0
    """K, tokens drafted per forward of the target; 0 without a draft."""
    slots: int = 1
    """Texts decoded at a time."""
    max_length: int
    """Tokens of the longest text, prompt and draft included."""
    is_measured: bool = True
    """Whether each prompt must take as long as it does alone: nothing of earlier ones is reused."""
    chat_template: str | None = None
    """Jinja text; None means that of the weights."""
    tool_parser: str | None = None
    """vLLM's parser of the target's tool calls; llama.cpp needs none."""
