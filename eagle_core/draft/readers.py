"""What reads an exported draft, and which variants of a draft each reader has.

A reader that lacks a variant does not say so: it drops tensors that it does not know, and ignores
keys. So an export or a server for it is refused here. All of it is from the sources of these
versions; vLLM, llama.cpp and speculators are also run in tests:

* vLLM 0.32: `model_executor/models/llama_eagle3.py` and `qwen3_eagle3.py`.
* SGLang 0.5.23: `srt/models/llama_eagle3.py` and `llama.py`.
* TensorRT-LLM at 00679c66: `_torch/models/modeling_speculative.py`.
* llama.cpp 11434: `conversion/llama.py` and `src/models/eagle3.cpp`.
* speculators 0.9.0: `models/eagle3/core.py`, and transformers' Llama and Qwen3 layers.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.errors import ConfigError

Reader = Literal["vllm", "sglang", "tensorrt_llm", "llamacpp", "speculators"]
TITLES: Mapping[Reader, str] = {
    "vllm": "vLLM 0.32",
    "sglang": "SGLang 0.5.23",
    "tensorrt_llm": "TensorRT-LLM",
    "llamacpp": "llama.cpp 11434",
    "speculators": "speculators 0.9.0",
}
OF_SERVING: tuple[Reader, ...] = ("vllm", "sglang", "tensorrt_llm")
"""Those that load layout `serving`."""

_YARN = frozenset({"rope_type", "factor", "original_max_position_embeddings"})
_YARN_SHARED = _YARN | {"beta_fast", "beta_slow"}
"""Keys of `yarn` that all engines read alike."""


def _rope_type(config: DraftConfig) -> str | None:
    return None if config.rope_scaling is None else config.rope_scaling["rope_type"]


def _is_own_yarn(config: DraftConfig) -> bool:
    scaling: Mapping[str, Any] = config.rope_scaling or {}
    return _rope_type(config) == "yarn" and not scaling.keys() <= _YARN_SHARED


_UNEVEN_HEADS = "num_attention_heads that does not divide hidden_size"
"""All load `config.json` with transformers, whose Llama refuses that (5.23)."""
_VARIANTS: Mapping[str, Callable[[DraftConfig], bool]] = {
    "num_hidden_layers above 1": lambda config: config.num_hidden_layers > 1,
    "attention_bias": lambda config: config.attention_bias,
    "mlp_bias": lambda config: config.mlp_bias,
    "qk_norm": lambda config: config.qk_norm,
    "qk_norm with attention_bias": lambda config: config.qk_norm and config.attention_bias,
    "fc_norm": lambda config: config.fc_norm,
    "norm_output": lambda config: config.norm_output,
    "norm_before_fc with fc_norm": lambda config: config.norm_before_fc and config.fc_norm,
    "norm_before_residual": lambda config: config.norm_before_residual,
    "sliding_window": lambda config: config.sliding_window is not None,
    "hidden_size other than the target's": lambda config: config.has_own_embedding,
    "hidden_size three times the target's": (
        lambda config: config.hidden_size == NUM_AUX_LAYERS * config.target_hidden_size
    ),
    _UNEVEN_HEADS: lambda config: (
        not config.qk_norm and config.hidden_size % config.num_attention_heads > 0
    ),
    "rope_scaling of type dynamic": lambda config: _rope_type(config) == "dynamic",
    "rope_scaling of type longrope": lambda config: _rope_type(config) == "longrope",
    "rope_scaling of type yarn with more than factor, original length and betas": _is_own_yarn,
}
"""Variants that some reader lacks, by name."""

_FUSED_AS_WIDE = "hidden_size three times the target's"
"""Two engines tell states that are not yet fused by their width."""
_LACKING: Mapping[Reader, frozenset[str]] = {
    "vllm": frozenset({_UNEVEN_HEADS}),
    "sglang": frozenset(
        {
            *("attention_bias", "mlp_bias", "qk_norm", "norm_before_residual", "sliding_window"),
            *(_FUSED_AS_WIDE, _UNEVEN_HEADS, "rope_scaling of type dynamic"),
            "rope_scaling of type yarn with more than factor, original length and betas",
        }
    ),
    "tensorrt_llm": frozenset(
        {
            *("qk_norm", "norm_before_residual", "sliding_window", "norm_before_fc with fc_norm"),
            *(
                _FUSED_AS_WIDE,
                _UNEVEN_HEADS,
                "rope_scaling of type dynamic",
                "rope_scaling of type longrope",
            ),
            "rope_scaling of type yarn with more than factor, original length and betas",
        }
    ),
    "llamacpp": frozenset(
        {
            *("num_hidden_layers above 1", "attention_bias", "mlp_bias", "qk_norm", "fc_norm"),
            *("norm_output", "sliding_window", "rope_scaling of type longrope", _UNEVEN_HEADS),
            "rope_scaling of type yarn with more than factor, original length and betas",
        }
    ),
    "speculators": frozenset(
        {
            *("hidden_size other than the target's", _UNEVEN_HEADS),
            *("qk_norm with attention_bias", "norm_before_fc with fc_norm"),
        }
    ),
}


def lacking(reader: Reader, config: DraftConfig) -> tuple[str, ...]:
    """Return the variants of a draft that a reader does not have."""
    return tuple(
        name for name, is_of in _VARIANTS.items() if name in _LACKING[reader] and is_of(config)
    )


def readers_of(config: DraftConfig) -> tuple[Reader, ...]:
    """Return the readers that have all variants of a draft."""
    return tuple(reader for reader in TITLES if not lacking(reader, config))


def require_reader(reader: Reader, config: DraftConfig) -> None:
    """Raise ConfigError if a reader lacks a variant of the draft; says which readers have all."""
    variants = lacking(reader, config)
    if not variants:
        return
    others = [TITLES[other] for other in readers_of(config) if other != "speculators"]
    choice = f"choose {' or '.join(others)}, or train without" if others else "train without"
    if reader == "speculators" and others:
        choice = "set export.layouts=[serving], or train without"
    if any(name.startswith("rope_scaling") for name in variants):
        choice += " (draft.rope_scaling=none)"
    if _UNEVEN_HEADS in variants:
        choice += " (draft.num_attention_heads)"
    raise ConfigError(
        f"{TITLES[reader]} has no {' and '.join(variants)}, which this draft was trained with: "
        f"{choice}"
    )


def require_serving(config: DraftConfig) -> None:
    """Raise ConfigError if no engine of layout `serving` has all variants of the draft."""
    facts = {reader: lacking(reader, config) for reader in OF_SERVING}
    if all(facts.values()):
        listed = "; ".join(f"{TITLES[one]} has no {', '.join(facts[one])}" for one in facts)
        raise ConfigError(
            f"layout serving: no engine can serve this draft: {listed}; train without one of them"
        )
