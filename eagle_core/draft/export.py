"""Export trained drafts as folders that serving engines load.

Two layouts of tensors: `serving` for SGLang, vLLM and TensorRT-LLM (`LlamaForCausalLMEagle3`) and
`speculators` for the speculators library and vLLM's loader for that format. A folder appears only
when it is complete. An export always names the aux layers: without them, engines silently use a
default. SGLang counts layers from 0; vLLM and speculators count from 1.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from eagle_core.atomic_files import atomic_folder
from eagle_core.bfloat16 import DTYPES, require_finite
from eagle_core.config_model import ConfigModel
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.layout import EMBEDDING, VOCABULARY, to_speculators
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TensorLayout = Literal["serving", "speculators"]
ExportLayout = Literal["serving", "speculators", "gguf"]


class ExportConfig(ConfigModel):
    """How to export a trained draft for serving."""

    layouts: tuple[ExportLayout, ...] = Field(
        default=("serving", "speculators"),
        min_length=1,
        description="serving: for SGLang, vLLM and TensorRT-LLM; speculators: for the speculators "
        "library; gguf: for llama.cpp, whose converter writes it. Each layout is written to a "
        "folder of that name.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Dtype of the exported weights; training keeps float32."
    )
    with_embedding: bool = Field(
        default=False,
        description="Also write the target's embedding into the serving layout. Engines share the "
        "target's own, so this only makes the file larger.",
    )
    speculative_tokens: int = Field(
        default=5,
        gt=0,
        description="Default number of drafted tokens per round, for the speculators config.",
    )
    verifier: str | None = Field(
        default=None,
        description="Hugging Face id or folder of the target, for the speculators config; empty "
        "means the target's own `model`.",
    )


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
    written: dict[TensorLayout, Path] = {}
    for layout in config.layouts:
        if layout == "gguf":
            continue
        # speculators itself saves the embedding. With transformers 5.23 it uses uninitialised
        # memory for a missing one: it checks for NaN, which is no longer there.
        with_embedding = config.with_embedding or layout == "speculators"
        tensors = _tensors(draft, config, with_embedding=with_embedding)
        cure = "export another checkpoint, or set export.dtype=float32"
        require_finite(tensors, where=f"the draft for {folder / layout}", cure=cure)
        if layout == "speculators":
            document = speculators_config(draft.config, target, config)
            tensors = {to_speculators(name): tensor for name, tensor in tensors.items()}
        else:
            document = serving_config(draft.config, target, config)
        _write(folder / layout, document, tensors)
        written[layout] = folder / layout
    return written


def serving_config(
    draft: DraftConfig, target: ServedTarget, config: ExportConfig
) -> dict[str, object]:
    """Return the config.json that SGLang and vLLM read."""
    engine_layers = _layers_from_one(target)
    document: dict[str, object] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_layer_config(draft, target),
        "draft_vocab_size": draft.draft_vocab_size,
        "torch_dtype": config.dtype,
        "eagle_config": {
            # SGLang adds 1 to these and uses the outputs of the layers they name.
            "eagle_aux_hidden_state_layer_ids": list(target.aux_layers),
            "use_aux_hidden_state": True,
        },
        # vLLM uses these unchanged: j is the output of decoder layer j - 1.
        "eagle_aux_hidden_state_layer_ids": engine_layers,
    }
    document.update(_norms(draft))
    if draft.target_hidden_size != draft.hidden_size:
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
        "norm_before_residual": False,
        **_norms(draft),
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
    """Return the EAGLE-3.1 flags that are set; configs of plain drafts have none."""
    flags = {"fc_norm": draft.fc_norm, "norm_output": draft.norm_output}
    return {name: True for name, is_set in flags.items() if is_set}


def _layers_from_one(target: ServedTarget) -> list[int]:
    return [layer + 1 for layer in target.aux_layers]


def _layer_config(draft: DraftConfig, target: ServedTarget) -> dict[str, object]:
    """Return the decoder layer's configuration, with the same keys in both layouts."""
    return {
        "model_type": "llama",
        "vocab_size": draft.vocab_size,
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": draft.num_attention_heads,
        "num_key_value_heads": draft.num_key_value_heads,
        "head_dim": draft.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": draft.rms_norm_eps,
        "max_position_embeddings": draft.max_position_embeddings,
        "rope_theta": draft.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": draft.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
        "pad_token_id": target.pad_token_id,
    }


def _tensors(draft: DraftModel, config: ExportConfig, *, with_embedding: bool) -> dict[str, Tensor]:
    dtype = DTYPES[config.dtype]
    omitted = set() if with_embedding else {EMBEDDING}
    if draft.config.draft_vocab_size == draft.config.vocab_size:
        # If both vocabularies are equal, vLLM and speculators have no mapping, and vLLM rejects
        # one.
        omitted |= set(VOCABULARY)
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in draft.published_tensors().items()
        if name not in omitted
    }


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
