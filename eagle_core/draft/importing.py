"""Read existing EAGLE-3 drafts in any published layout, to start training from them.

Layouts: SpecForge, EAGLE, SGLang and vLLM (`midlayer.*`, flat config.json) and speculators
(`layers.0.*`, `transformer_layer_config`), as safetensors, or as `pytorch_model.bin` read without
unpickling code. Unsupported variants are refused, not read in part: biases, q and k norms, scaled
rotary embeddings, and a residual taken after the norm.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eagle_core.bfloat16 import require_finite
from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.draft.layout import EMBEDDING, VOCABULARY, from_any_layout, require_shapes
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.safetensors_files import weight_files

_CONFIG_NAME = "config.json"
_PICKLED_NAME = "pytorch_model.bin"
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_REFUSED_FLAGS = ("norm_before_residual", "norm_before_fc")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImportedDraft:
    """A draft read from disk, with our tensor names."""

    config: DraftConfig
    tensors: Mapping[str, Tensor]
    """By our names; the embedding only if the folder has one, `d2t` and `t2d` always."""
    aux_layers: tuple[int, ...] | None
    """0-based decoder layers it was trained on; None if the folder does not record them."""


def read_draft(folder: Path) -> ImportedDraft:
    """Read an EAGLE-3 draft.

    Raises:
        ConfigError: there is no draft, or a part is missing.
        MismatchError: it is a variant that our draft model does not support.
        CorruptError: a file is damaged, its vocabulary mapping contradicts itself, or a weight is
            not finite.

    """
    document = _read_config(folder)
    layer = document.get("transformer_layer_config") or document
    if not isinstance(layer, Mapping):
        raise CorruptError(f"{folder / _CONFIG_NAME}: transformer_layer_config is not an object")
    loaded = _load(folder)
    _refuse_variants(document, layer, loaded, folder)
    tensors = _renamed(loaded)
    require_finite(tensors, where=str(folder), cure="start from another draft")
    if "fc.weight" not in tensors or "lm_head.weight" not in tensors:
        raise ConfigError(f"{folder} lacks fc.weight or lm_head.weight; it is not an EAGLE-3 draft")
    config = _draft_config(document, layer, tensors)
    tensors.update(_vocabulary(tensors, config, folder))
    require_shapes(tensors, config, optional=(EMBEDDING,), location=str(folder))
    return ImportedDraft(config=config, tensors=tensors, aux_layers=_aux_layers(document, folder))


def require_fit(config: DraftConfig, imported: ImportedDraft) -> None:
    """Raise MismatchError if a size other than that of the draft vocabulary differs."""
    ours = config.model_dump(exclude={"draft_vocab_size", "max_position_embeddings"})
    theirs = imported.config.model_dump()
    differing = [name for name, value in ours.items() if theirs[name] != value]
    if differing:
        facts = ", ".join(f"{name} {theirs[name]} (ours {ours[name]})" for name in differing)
        flags = [name for name in differing if isinstance(ours[name], bool)]
        settings = ", ".join(f"training.{name}={str(theirs[name]).lower()}" for name in flags)
        cure = f"set {settings}" if flags == differing else "start from another draft"
        raise MismatchError(f"the given draft does not fit this one: {facts}; {cure}")


@torch.no_grad()
def warm_start(draft: DraftModel, imported: ImportedDraft) -> int:
    """Copy the weights of `imported` to an initialised `draft`; return the number of head rows.

    The draft keeps its own vocabulary and embedding. Head rows of tokens in both vocabularies are
    copied; the others remain the target's own rows.

    Raises:
        MismatchError: the two differ in a size other than that of the draft vocabulary.

    """
    require_fit(draft.config, imported)
    own = dict(draft.named_parameters())
    kept = {EMBEDDING, "lm_head.weight"}
    for name in own.keys() - kept:
        own[name].copy_(imported.tensors[name])
    draft.fc.weight.mul_(draft.aux_scale)
    common = draft.t2d.cpu() & imported.tensors["t2d"]
    rows = (draft.t2d.cpu().cumsum(0) - 1)[common].to(draft.t2d.device)
    their_rows = (imported.tensors["t2d"].cumsum(0) - 1)[common]
    head = imported.tensors["lm_head.weight"][their_rows]
    draft.lm_head.weight[rows] = head.to(draft.lm_head.weight)
    return len(their_rows)


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / _CONFIG_NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} has no {_CONFIG_NAME}; give the folder of an EAGLE-3 draft"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON: {error}; download the draft again") from error
    if not isinstance(document, Mapping):
        raise CorruptError(f"{path} is not a JSON object; download the draft again")
    return document


def _refuse_variants(
    document: Mapping[str, object],
    layer: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    flags = [name for name in _REFUSED_FLAGS if document.get(name)]
    # Count the layers from the weights: some configurations give the target's number.
    layers = {found[1] for name in tensors if (found := _LAYER_NUMBER.search(name))}
    if len(layers) > 1:
        flags.append(f"{len(layers)} layers")
    rope = _rope(layer)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        flags.append("rope scaling")
    if flags:
        raise MismatchError(
            f"{folder} uses {', '.join(flags)}, which this draft model does not support; "
            "start from a plain EAGLE-3 draft"
        )


def _rope(layer: Mapping[str, object]) -> Mapping[str, object]:
    for key in ("rope_parameters", "rope_scaling"):
        rope = layer.get(key)
        if isinstance(rope, Mapping):
            return rope
    return {}


def _load(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    pickled = folder / _PICKLED_NAME
    try:
        for path in weight_files(folder):
            tensors.update(load_file(path))
        if not tensors and pickled.is_file():
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except (
        *(SafetensorError, OSError, EOFError, ValueError, RuntimeError, UnpicklingError),
    ) as error:
        raise CorruptError(
            f"the weights in {folder} cannot be read: {error}; download the draft again"
        ) from error
    if not tensors:
        raise ConfigError(f"{folder} has neither *.safetensors nor {_PICKLED_NAME}")
    return tensors


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = ((from_any_layout(name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _draft_config(
    document: Mapping[str, object], layer: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> DraftConfig:
    """Return the sizes, from the tensors where possible, else from the configuration."""
    hidden_size, fused = tensors["fc.weight"].shape
    heads = _number(layer, "num_attention_heads")
    attention = "midlayer.self_attn"
    query = tensors.get(f"{attention}.q_proj.weight", tensors["fc.weight"])
    key = tensors.get(f"{attention}.k_proj.weight", query)
    head_dim = _number(layer, "head_dim", len(query) // heads)
    rope = _rope(layer)
    return DraftConfig(
        hidden_size=hidden_size,
        target_hidden_size=fused // NUM_AUX_LAYERS,
        intermediate_size=_number(layer, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=_number(layer, "num_key_value_heads", len(key) // head_dim),
        head_dim=head_dim,
        vocab_size=_number(layer, "vocab_size"),
        draft_vocab_size=len(tensors["lm_head.weight"]),
        rms_norm_eps=_real(layer, "rms_norm_eps", 1e-5),
        rope_theta=_real(rope, "rope_theta", _real(layer, "rope_theta", 10000.0)),
        max_position_embeddings=_number(layer, "max_position_embeddings", 2048),
        fc_norm=bool(document.get("fc_norm")),
        norm_output=bool(document.get("norm_output")),
    )


def _number(layer: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = layer.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"the draft's {_CONFIG_NAME} has no integer above 0 for {key}")
    return value


def _real(mapping: Mapping[str, object], key: str, default: float) -> float:
    value = mapping.get(key)
    return float(value) if isinstance(value, int | float) else default


def _vocabulary(
    tensors: Mapping[str, Tensor], config: DraftConfig, folder: Path
) -> dict[str, Tensor]:
    """Return `d2t` and `t2d`; a draft over the full vocabulary may have neither."""
    num_draft, num_target = config.draft_vocab_size, config.vocab_size
    if "d2t" not in tensors and num_draft != num_target:
        raise ConfigError(f"{folder} has {num_draft} of {num_target} tokens but no d2t")
    d2t = tensors.get("d2t", torch.zeros(num_draft, dtype=torch.int64)).to(torch.int64)
    ids = torch.arange(num_draft) + d2t
    t2d = torch.zeros(num_target, dtype=torch.bool)
    if len(d2t) != num_draft or not ((ids >= 0) & (ids < num_target)).all():
        raise CorruptError(f"{folder}: d2t does not map {num_draft} tokens into {num_target}")
    t2d[ids] = True
    is_increasing = bool((ids.diff() > 0).all())
    if not is_increasing or not torch.equal(tensors.get("t2d", t2d).to(torch.bool), t2d):
        raise CorruptError(
            f"{folder}: d2t and t2d contradict each other or do not increase; the file is damaged"
        )
    return dict(zip(VOCABULARY, (d2t, t2d), strict=True))


def _aux_layers(document: Mapping[str, object], folder: Path) -> tuple[int, ...] | None:
    """Return 0-based layers; the two keys count differently (see `eagle_core.draft.export`)."""
    eagle = document.get("eagle_config")
    key = "eagle_aux_hidden_state_layer_ids"
    nested = eagle.get(key) if isinstance(eagle, Mapping) else None
    listed, first = (nested, 0) if isinstance(nested, list) else (document.get(key), 1)
    if not isinstance(listed, list):
        return None
    if not all(isinstance(layer, int) for layer in listed):
        raise CorruptError(
            f"{folder / _CONFIG_NAME}: {key} is {listed}; expected numbers of layers; download "
            "the draft again"
        )
    return tuple(layer - first for layer in listed)
