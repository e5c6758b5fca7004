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
    draft_p_min: float = 0.0
    """Probability below which llama.cpp stops drafting in a round; 0 always drafts K tokens."""
    slots: int = 1
    """Texts decoded at a time."""
    max_length: int
    """Tokens of the longest text, prompt and draft included."""
    host: str = "127.0.0.1"
    """Address that the server listens on."""
    is_measured: bool = True
    """Whether speed and texts are measured: then no cache serves one prompt faster than another,
    and no file of the target changes how tokens are sampled."""
    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's chat template; None keeps that."""
    tool_parser: str | None = None
    """vLLM's parser of the target's tool calls; llama.cpp needs none."""
    reasoning_parser: str | None = None
    """vLLM's parser of the target's reasoning; llama.cpp needs none."""
