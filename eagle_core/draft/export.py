"""Export trained drafts as folders that serving engines load.

Two layouts of tensors: `serving` for SGLang, vLLM and TensorRT-LLM and `speculators` for the
speculators library and vLLM's loader for that format. A folder appears only when it is complete. An
export always names the aux layers: without them, engines silently use a default. SGLang counts
layers from 0; vLLM and speculators count from 1. What no engine of a layout can run is refused
(`eagle_core.draft.readers`).
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from eagle_core.atomic_files import atomic_folder
from eagle_core.bfloat16 import DTYPES, require_finite
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.export_config import ExportConfig, TensorLayout
from eagle_core.draft.layout import EMBEDDING, HEAD, VOCABULARY, to_serving, to_speculators
from eagle_core.draft.model import DraftModel
from eagle_core.draft.readers import require_reader, require_serving
from eagle_core.errors import ConfigError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TARGET_HEAD = "target_head"
"""Our key of layout speculators, which holds the target's own head as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTarget:
    """What an export records about the target, which verifies the drafts."""

    name_or_path: str
    architectures: tuple[str, ...]
    aux_layers: tuple[int, int, int]
    """0-based decoder layers whose outputs the draft reads, low to high."""
    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None

    @classmethod
    def of(
        cls, config: PretrainedConfig, *, name_or_path: str, aux_layers: tuple[int, int, int]
    ) -> Self:
        """Take the fields from `config`, the target's own."""
        return cls(
            name_or_path=name_or_path,
            architectures=tuple(config.architectures or ()),
            aux_layers=aux_layers,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )


def export(
    draft: DraftModel, target: ServedTarget, folder: Path, config: ExportConfig
) -> dict[TensorLayout, Path]:
    """Write each layout of tensors of `config` to its own folder under `folder`; return the paths.

    Layout gguf is that of `eagle_core.serving.llamacpp.draft_file`.

    Raises:
        ConfigError: a folder holds other files, or a layout cannot represent the draft.
        CorruptError: a weight is not finite; nothing is written.

    """
    layouts: list[TensorLayout] = [layout for layout in config.layouts if layout != "gguf"]
    for layout in layouts:  # nothing is written if one is refused
        require_layout(layout, draft.config)
    written: dict[TensorLayout, Path] = {}
    for layout in layouts:
        tensors = _tensors(draft, config, layout)
        cure = "export another checkpoint, or set export.dtype=float32"
        require_finite(tensors, where=f"the draft for {folder / layout}", cure=cure)
        if layout == "speculators":
            document = speculators_config(draft.config, target, config)
            tensors = to_speculators(tensors)
        else:
            document = serving_config(draft.config, target, config)
            tensors = to_serving(tensors)
        _write(folder / layout, document, tensors)
        written[layout] = folder / layout
    return written


def require_layout(layout: TensorLayout, config: DraftConfig) -> None:
    """Raise ConfigError if a layout, or everything that reads it, lacks a variant of the draft."""
    if layout == "speculators":
        require_reader("speculators", config)
    else:
        require_serving(config)


def serving_config(
    draft: DraftConfig, target: ServedTarget, config: ExportConfig
) -> dict[str, object]:
    """Return the config.json that SGLang, vLLM and TensorRT-LLM read."""
    architecture = "Eagle3Qwen3ForCausalLM" if draft.qk_norm else "LlamaForCausalLMEagle3"
    eagle: dict[str, object] = {
        # SGLang adds 1 to these and uses the outputs of the layers they name.
        "eagle_aux_hidden_state_layer_ids": list(target.aux_layers),
        "use_aux_hidden_state": True,
    }
    if draft.norm_before_fc:  # TensorRT-LLM looks for it here only
        eagle["norm_before_fc"] = True
    document: dict[str, object] = {
        "architectures": [architecture],
        **_layer_config(draft, target),
        # Without a head of its own, SGLang takes the target's if this is null.
        "draft_vocab_size": None if draft.target_head else draft.draft_vocab_size,
        "torch_dtype": config.dtype,
        "eagle_config": eagle,
        # vLLM uses these unchanged: j is the output of decoder layer j - 1.
        "eagle_aux_hidden_state_layer_ids": _layers_from_one(target),
    }
    document.update(_norms(draft))
    if draft.norm_before_residual:
        document["norm_before_residual"] = True
    if draft.has_own_embedding:
        document["target_hidden_size"] = draft.target_hidden_size
    return document


def speculators_config(
    draft: DraftConfig, target: ServedTarget, config: ExportConfig
) -> dict[str, object]:
    """Return the config.json that speculators reads.

    Raises:
        ConfigError: the draft is not as wide as the target, which speculators cannot load.

    """
    if draft.target_hidden_size != draft.hidden_size:
        raise ConfigError(
            f"the speculators layout needs a draft as wide as its target; the draft has width "
            f"{draft.hidden_size}, the target {draft.target_hidden_size}; export layout serving"
        )
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": config.speculative_tokens,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": draft.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": _layers_from_one(target),
        "norm_before_residual": draft.norm_before_residual,
        **_norms(draft),
        **({TARGET_HEAD: True} if draft.target_head else {}),
        "torch_dtype": config.dtype,
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": config.verifier or target.name_or_path,
                "architectures": list(target.architectures),
            },
        },
        "transformer_layer_config": _layer_config(draft, target),
    }


def _norms(draft: DraftConfig) -> dict[str, object]:
    """Return the norms that are set; configs of plain drafts have none."""
    flags = {
        "fc_norm": draft.fc_norm,
        "norm_output": draft.norm_output,
        "norm_before_fc": draft.norm_before_fc,
    }
    return {name: True for name, is_set in flags.items() if is_set}


def _layers_from_one(target: ServedTarget) -> list[int]:
    return [layer + 1 for layer in target.aux_layers]


def _layer_config(draft: DraftConfig, target: ServedTarget) -> dict[str, object]:
    """Return the configuration of the decoder layers, with the same keys in both layouts."""
    return {
        "model_type": "qwen3" if draft.qk_norm else "llama",
        "vocab_size": draft.vocab_size,
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "num_hidden_layers": draft.num_hidden_layers,
        "num_attention_heads": draft.num_attention_heads,
        "num_key_value_heads": draft.num_key_value_heads,
        "head_dim": draft.head_dim,
        "hidden_act": "silu",
        "attention_bias": draft.attention_bias,
        "mlp_bias": draft.mlp_bias,
        "rms_norm_eps": draft.rms_norm_eps,
        "max_position_embeddings": draft.max_position_embeddings,
        **_rope(draft),
        **_window(draft),
        "tie_word_embeddings": False,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
        "pad_token_id": target.pad_token_id,
    }


def _rope(draft: DraftConfig) -> dict[str, object]:
    """Return today's key, and those of transformers before 5."""
    keys: dict[str, object] = {"rope_theta": draft.rope_theta}
    scaling = draft.rope_scaling
    if scaling is not None:
        keys["rope_scaling"] = scaling
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": draft.rope_theta}
    return {**keys, "rope_parameters": parameters}


def _window(draft: DraftConfig) -> dict[str, object]:
    """Return what vLLM, for each layer, and transformers' Qwen3 need for a sliding window."""
    if draft.sliding_window is None:
        return {}
    return {
        "sliding_window": draft.sliding_window,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * draft.num_hidden_layers,
    }


def _tensors(draft: DraftModel, config: ExportConfig, layout: TensorLayout) -> dict[str, Tensor]:
    dtype = DTYPES[config.dtype]
    tensors = draft.published_tensors()
    omitted = _shared(draft.config, config, layout)
    if draft.config.draft_vocab_size == draft.config.vocab_size:
        # If both vocabularies are equal, vLLM and speculators have no mapping, and vLLM rejects
        # one.
        omitted |= set(VOCABULARY)
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in tensors.items()
        if name not in omitted
    }


def _shared(draft: DraftConfig, config: ExportConfig, layout: TensorLayout) -> set[str]:
    """Return the names of the target's own tensors that engines share, and a layout omits.

    speculators itself saves them. With transformers 5.23 it uses uninitialised memory for a missing
    one: it checks for NaN, which is no longer there.
    """
    if layout == "speculators":
        return set()
    shared = {HEAD} if draft.target_head else set()
    is_written = draft.has_own_embedding or config.with_embedding
    return shared if is_written else {*shared, EMBEDDING}


def require_own(folder: Path, names: Collection[str]) -> None:
    """Raise ConfigError if a folder holds other files than an export writes."""
    if folder.exists() and {path.name for path in folder.iterdir()} - set(names):
        raise ConfigError(
            f"{folder} holds files that no export wrote; move them or export to another folder"
        )


def _write(folder: Path, document: Mapping[str, object], tensors: dict[str, Tensor]) -> None:
    require_own(folder, (CONFIG_NAME, WEIGHTS_NAME))
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(document, indent=2)
        (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
