"""Read existing EAGLE-3 drafts in any published layout, to start training from them.

Layouts: SpecForge, EAGLE, ModelOpt, SGLang and vLLM (`midlayer.*` or `layers.0.*`, flat
config.json) and speculators (`layers.0.*`, `transformer_layer_config`), as safetensors, or as
`pytorch_model.bin` read without unpickling code. What a configuration leaves out is read as
`eagle_core.draft.imported_config` says; what our draft does not have is refused, not read in part.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from eagle_core.bfloat16 import require_finite
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.imported_config import CONFIG_NAME, imported_config
from eagle_core.draft.layout import (
    EMBEDDING,
    HEAD,
    VOCABULARY,
    expected_shapes,
    from_any_layout,
    require_shapes,
    with_one_input_norm,
)
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.safetensors_files import weight_files

_PICKLED_NAME = "pytorch_model.bin"
_OUTPUT_BIAS = "self_attn.o_proj.bias"
_NOT_COMPARED = {"draft_vocab_size", "max_position_embeddings"}
_OF_THE_TARGET = {"target_hidden_size", "vocab_size", "rms_norm_eps", "rope_theta"}
"""No setting changes these."""
_ROPE = "rope_scaling"
logger = logging.getLogger(__name__)


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
    document, layer = _read_documents(folder)
    tensors = with_one_input_norm(_renamed(_load(folder)), str(folder))
    require_finite(tensors, where=str(folder), cure="start from another draft")
    _require_fusing(tensors, folder)
    _untie(tensors, layer, folder)
    config = imported_config(document, tensors, str(folder))
    if config.target_head:
        tensors.pop(HEAD, None)
    _complete_biases(tensors, config, folder)
    tensors.update(_vocabulary(tensors, config, folder))
    optional = {HEAD} if config.target_head else set()
    optional |= set() if config.has_own_embedding else {EMBEDDING}
    require_shapes(tensors, config, optional=optional, location=str(folder))
    return ImportedDraft(config=config, tensors=tensors, aux_layers=_aux_layers(document, folder))


def read_draft_config(folder: Path) -> DraftConfig:
    """Read the configuration of a draft in safetensors, without its weights.

    Raises:
        ConfigError: there is no draft, or a part is missing.
        MismatchError: it is a variant that our draft model does not support.
        CorruptError: a file is damaged.

    """
    document, layer = _read_documents(folder)
    shapes: dict[str, Tensor] = {}
    try:
        for path in weight_files(folder):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    shape = file.get_slice(name).get_shape()
                    shapes[name] = torch.empty(shape, device="meta")
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"the weights in {folder} cannot be read: {error}") from error
    tensors = _renamed(shapes)
    _require_fusing(tensors, folder)
    _untie(tensors, layer, folder)
    return imported_config(document, tensors, str(folder))


def require_fit(config: DraftConfig, imported: ImportedDraft) -> None:
    """Raise MismatchError if a size other than that of the draft vocabulary differs.

    Names the settings that make ours like the given draft.
    """
    ours = config.model_dump(mode="json", exclude=_NOT_COMPARED)
    theirs = imported.config.model_dump(mode="json")
    differing = [name for name, value in ours.items() if theirs[name] != value]
    if differing:
        facts = ", ".join(f"{name} {theirs[name]} (ours {ours[name]})" for name in differing)
        settings = [_setting(name, ours[name], theirs[name]) for name in differing]
        cure = "start from another draft"
        if None not in settings:
            cure = "set " + " ".join(f"draft.{setting}" for setting in settings)
        raise MismatchError(f"the given draft does not fit this one: {facts}; {cure}")


def _setting(name: str, ours: object, theirs: object) -> str | None:
    """Return the setting that makes ours like theirs; None if none does."""
    if name in _OF_THE_TARGET:
        return None
    if name != _ROPE:
        return f"{name}={json.dumps(theirs)}"
    if theirs is None:
        return f"{_ROPE}=none"
    return None if ours is not None else f"{_ROPE}=target (if the target is scaled like that)"


@torch.no_grad()
def warm_start(draft: DraftModel, imported: ImportedDraft) -> int:
    """Copy the weights of `imported` to an initialised `draft`; return the number of head rows.

    The draft keeps its own vocabulary, and its embedding unless its width is not the target's. Head
    rows of tokens in both vocabularies are copied; the others remain the target's own rows. A head
    that is the target's own stays.

    Raises:
        MismatchError: the two differ in a size other than that of the draft vocabulary.

    """
    require_fit(draft.config, imported)
    own = dict(draft.named_parameters())
    kept = {HEAD} if draft.config.has_own_embedding else {EMBEDDING, HEAD}
    for name in own.keys() - kept:
        own[name].copy_(imported.tensors[name])
    draft.fc.weight.mul_(draft.aux_scale)
    common = draft.t2d.cpu() & imported.tensors["t2d"]
    rows = (draft.t2d.cpu().cumsum(0) - 1)[common].to(draft.t2d.device)
    their_rows = (imported.tensors["t2d"].cumsum(0) - 1)[common]
    if not draft.config.target_head:
        head = imported.tensors[HEAD][their_rows]
        draft.lm_head.weight[rows] = head.to(draft.lm_head.weight)
    return len(their_rows)


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} has no {CONFIG_NAME}; give the folder of an EAGLE-3 draft"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON: {error}; download the draft again") from error
    if not isinstance(document, Mapping):
        raise CorruptError(f"{path} is not a JSON object; download the draft again")
    return document


def _read_documents(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return config.json, and its part that describes the decoder layers."""
    document = _read_config(folder)
    layer = document.get("transformer_layer_config") or document
    if not isinstance(layer, Mapping):
        raise CorruptError(f"{folder / CONFIG_NAME}: transformer_layer_config is not an object")
    return document, layer


def _require_fusing(tensors: Mapping[str, Tensor], folder: Path) -> None:
    if "fc.weight" not in tensors or tensors["fc.weight"].ndim != 2:
        raise ConfigError(f"{folder} lacks fc.weight; it is not an EAGLE-3 draft")


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


def _untie(tensors: dict[str, Tensor], layer: Mapping[str, object], folder: Path) -> None:
    """Give the draft the head that its configuration says is its embedding."""
    if HEAD in tensors or not layer.get("tie_word_embeddings"):
        return
    if EMBEDDING in tensors:
        logger.info("%s: the head is the embedding (tie_word_embeddings)", folder)
        tensors[HEAD] = tensors[EMBEDDING].clone()
    else:
        logger.info("%s has neither head nor embedding: both are the target's", folder)


def _complete_biases(tensors: dict[str, Tensor], config: DraftConfig, folder: Path) -> None:
    """Add zeros if only queries, keys and values have biases, as in Qwen2."""
    if any(name.endswith(_OUTPUT_BIAS) for name in tensors):
        return
    missing = [name for name in expected_shapes(config) if name.endswith(_OUTPUT_BIAS)]
    if missing:
        logger.info("%s has no bias of the output projection; taken as zero", folder)
    for name in missing:
        weight = tensors["norm.weight"] if "norm.weight" in tensors else tensors["fc.weight"]
        tensors[name] = weight.new_zeros(config.hidden_size)


def _vocabulary(
    tensors: Mapping[str, Tensor], config: DraftConfig, folder: Path
) -> dict[str, Tensor]:
    """Return `d2t` and `t2d`; a draft over the full vocabulary may have neither."""
    num_draft, num_target = config.draft_vocab_size, config.vocab_size
    d2t = torch.zeros(num_draft, dtype=torch.int64)
    if "d2t" in tensors:
        d2t = tensors["d2t"].to(torch.int64)
    elif num_draft != num_target:
        if "t2d" not in tensors:
            raise ConfigError(f"{folder} has {num_draft} of {num_target} tokens but no d2t")
        logger.info("%s has no d2t; it follows from t2d", folder)
        chosen = torch.nonzero(tensors["t2d"]).flatten()
        d2t = chosen - torch.arange(len(chosen))
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
            f"{folder / CONFIG_NAME}: {key} is {listed}; expected numbers of layers; download "
            "the draft again"
        )
    return tuple(layer - first for layer in listed)
