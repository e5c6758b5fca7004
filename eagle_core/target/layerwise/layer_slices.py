"""Some decoder layers of a target as a model of their own, built by the target's own classes.

A slice of the configuration and the tensors of these layers are all that transformers needs.
Targets whose layers are not a chain are refused: those that share keys and values, or take
per-layer inputs.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import load_tensor
from eagle_core.target.config import TargetConfig
from eagle_core.target.decoder import find_decoder
from eagle_core.target.end_weights import embedding_name
from eagle_core.target.model_config import target_dtype
from eagle_core.target.skeleton import build_skeleton, certain, silent

if TYPE_CHECKING:  # takes 2 of the 8 seconds before a flow starts; only running a model needs it
    from transformers import PreTrainedModel

_NOT_A_CHAIN = ("num_kv_shared_layers", "hidden_size_per_layer_input")
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
_NUM_OF_FIRST = ("first_k_dense_replace", "num_dense_layers")
_NOT_COMPARED = ("layer_idx", "training")
"""Set after a layer is built, or of no effect in a target."""
_EMBEDDING = "embed_tokens.weight"


def require_chain(whole: PretrainedConfig, *, cure: str) -> None:
    """Raise ConfigError, with the cure, if a layer depends on more than the one before it."""
    for name in _NOT_A_CHAIN:
        if getattr(whole, name, None):
            raise ConfigError(
                f"a target of type {whole.model_type} ({name} is {getattr(whole, name)}) has "
                "layers that depend on more than the previous layer and cannot run alone; "
                f"{cure}"
            )


def slice_config(whole: PretrainedConfig, layers: range) -> PretrainedConfig:
    """Return the configuration of a model that has only `layers` of the whole one.

    Lists with one entry per layer (attention kinds, windows, rope, experts) are sliced. Lists of
    layer numbers and layer counts are shifted. The layers must be a chain.
    """
    num_layers = whole.num_hidden_layers
    part = copy.deepcopy(whole)
    part.num_hidden_layers = len(layers)
    for name, value in whole.to_dict().items():
        if isinstance(value, list) and len(value) == num_layers and name not in _LAYER_NUMBERS:
            setattr(part, name, value[layers.start : layers.stop])
    for name in _LAYER_NUMBERS:
        if getattr(whole, name, None) is not None:
            numbers = [layer - layers.start for layer in getattr(whole, name) if layer in layers]
            setattr(part, name, numbers)
    step = getattr(whole, "decoder_sparse_step", None)
    if step is not None:  # expert layers are counted from layer 0
        dense = [layer for layer in layers if (layer + 1) % step or layer in whole.mlp_only_layers]
        part.mlp_only_layers = [layer - layers.start for layer in dense]
        part.decoder_sparse_step = 1
    for name in _NUM_OF_FIRST:
        num_first = getattr(whole, name, None)
        if num_first is not None:
            setattr(part, name, max(0, num_first - layers.start))
    return part


def plain_layers(config: TargetConfig, whole: PretrainedConfig) -> nn.ModuleList:
    """Return the layers of the whole model, without values."""
    decoder = find_decoder(build_skeleton(config, whole))
    layers: nn.ModuleList = decoder.layers  # type: ignore[union-attr, assignment]
    return layers


def require_own_layers(
    config: TargetConfig,
    whole: PretrainedConfig,
    plain: nn.ModuleList,
    parts: Iterable[range],
    *,
    cure: str,
) -> None:
    """Raise ConfigError, with the cure, if layers of a slice are not built as those of the model.

    Some architectures decide by a layer's number, in ways that `slice_config` does not know. The
    modules are compared by name, kind, shapes and plain settings; nothing has values.

    Args:
        config: the target.
        whole: its configuration.
        plain: the layers of its model.
        parts: the slices.
        cure: what to do instead.

    """
    for layers in parts:
        what = f"layers of a {whole.model_type} model cannot be built alone; {cure}"
        with certain(config, what), torch.device("meta"):
            built: nn.ModuleList = AutoModel.from_config(  # type: ignore[no-untyped-call]
                slice_config(whole, layers),
                trust_remote_code=config.trust_remote_code,
                attn_implementation=config.attention,
            ).layers
        for number, layer in zip(layers, built, strict=True):
            differing = sorted(kind_of(layer).items() ^ kind_of(plain[number]).items())
            if differing:
                raise ConfigError(
                    f"target {config.name}: layer {number} of a {whole.model_type} model cannot "
                    f"run alone: built by itself, it has another {differing[0][0]}; {cure}"
                )


def kind_of(layer: nn.Module) -> dict[str, object]:
    """Return what a layer is made of, by name: classes, shapes, and settings that are numbers."""
    found: dict[str, object] = {}
    for name, module in layer.named_modules():
        found[name] = type(module).__name__
        for key, value in vars(module).items():
            is_setting = isinstance(value, int | float | str) and not key.startswith("_")
            if is_setting and key not in _NOT_COMPARED:
                found[f"{name}.{key}"] = value
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        found[name] = tuple(tensor.shape)
    return found


def slice_tensors(
    files: Mapping[str, Path], folder: Path, layers: range, *, with_embedding: bool = True
) -> dict[str, Tensor]:
    """Read the tensors of `layers`, numbered from 0, with the norm.

    The embedding is among them if the first layer is: the input of others is states. Without
    it, the first layer reads states, too.
    """
    return dict(_named(files, folder, layers, with_embedding=with_embedding and not layers.start))


def _named(
    files: Mapping[str, Path], folder: Path, layers: range, *, with_embedding: bool
) -> Iterator[tuple[str, Tensor]]:
    prefix = embedding_name(files, folder).removesuffix(_EMBEDDING)
    for name in files:
        inner = name.removeprefix(prefix)
        if inner == name and prefix:
            continue
        kind, _, rest = inner.partition(".")
        if kind == "layers":
            number, _, inside = rest.partition(".")
            if int(number) not in layers:
                continue
            inner = f"layers.{int(number) - layers.start}.{inside}"
        elif kind == "lm_head" or (kind == "embed_tokens" and not with_embedding):
            continue
        yield inner, load_tensor(files, name)


def build_slice(
    config: TargetConfig, whole: PretrainedConfig, tensors: Mapping[str, Tensor], layers: range
) -> "PreTrainedModel":
    """Return a model of `layers` alone with the `tensors` of `slice_tensors`, on the CPU.

    Raises:
        ConfigError: a tensor is missing; names it.

    """
    part, given = slice_config(whole, layers), dict(tensors)
    if _EMBEDDING not in given:  # its input is states, never ids
        part.vocab_size, part.pad_token_id = 1, None
        given[_EMBEDDING] = torch.zeros(1, part.hidden_size)
    return _build(config, part, given, f"layers {layers.start} to {layers.stop - 1}")


def build_ends(
    config: TargetConfig, whole: PretrainedConfig, tensors: Mapping[str, Tensor]
) -> "PreTrainedModel":
    """Return the model without its layers: embedding, positions and norm, on the CPU.

    It knows the kinds of all layers, for their masks and positions. `tensors` are those of
    `slice_tensors` for no layer.

    Raises:
        ConfigError: a tensor is missing; names it.

    """
    part = copy.deepcopy(whole)
    part.num_hidden_layers = 0
    return _build(config, part, tensors, "embedding and norm")


def _build(
    config: TargetConfig, part: PretrainedConfig, tensors: Mapping[str, Tensor], what: str
) -> "PreTrainedModel":
    with torch.device("meta"):
        architecture = type(
            AutoModel.from_config(  # type: ignore[no-untyped-call]
                part, trust_remote_code=config.trust_remote_code
            )
        )
    with silent():  # a bar for each layer
        model, loading = architecture.from_pretrained(
            None,
            config=part,
            state_dict=dict(tensors),
            dtype=target_dtype(config),
            attn_implementation=config.attention,
            output_loading_info=True,
        )
    if loading["missing_keys"]:
        raise ConfigError(
            f"target {config.name}: its weights have no tensor for {min(loading['missing_keys'])} "
            f"of {what}: the download is not whole; download them again"
        )
    built: PreTrainedModel = model
    built.train(mode=False).requires_grad_(requires_grad=False)
    return built
