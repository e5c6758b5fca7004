"""Names and shapes of an EAGLE-3 draft's tensors in the layouts of other tools.

`DraftModel.published_tensors` have the published names (`midlayer.*`), which SGLang, vLLM,
SpecForge and EAGLE use; speculators calls the layer `layers.0`. `d2t` holds offsets everywhere.

Further layers are `layers.1` and so on. vLLM reads the norm before their attention as
`input_layernorm`, SGLang and TensorRT-LLM as `hidden_norm`: layout `serving` has it under both
names, and then the first layer is `layers.0` there too, where TensorRT-LLM looks for it.

Shapes: H draft hidden, Ht target hidden, D draft vocabulary, V target vocabulary.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.errors import ConfigError, MismatchError

EMBEDDING = "embed_tokens.weight"
"""Optional in every layout: engines share the target's."""
HEAD = "lm_head.weight"
INPUT_NORM = "input_norm.weight"
VOCABULARY = ("d2t", "t2d")
FIRST_LAYER = "midlayer."
_NUMBERED_FIRST_LAYER = "layers.0."
_LAYER = re.compile(r"layers\.(\d+)\.")
_INPUT_NORM, _HIDDEN_NORM = "input_layernorm.weight", "hidden_norm.weight"
_WRAPPER = "model."
_IGNORED = frozenset({"verifier_lm_head.weight", "verifier_norm.weight"})
"""Copies of the target's own tensors that speculators may save with the draft."""
_BUFFER = "rotary_emb.inv_freq"
"""Computed from the configuration; old files hold it."""
_LEGACY = {f"aux_norm_{name}.": f"fc_norm.{number}." for number, name in enumerate(("low", "mid"))}
_LEGACY["aux_norm_high."] = "fc_norm.2."
"""Names that SGLang still reads."""


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a draft by name, embedding included."""
    size, fused = config.hidden_size, NUM_AUX_LAYERS * config.target_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, size),
        "fc.weight": (size, fused),
        **_layer_shapes(config, FIRST_LAYER, width=2 * size),
        "midlayer.hidden_norm.weight": (size,),
        "norm.weight": (size,),
        HEAD: (config.draft_vocab_size, size),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (fused,)
    for number in range(NUM_AUX_LAYERS if config.fc_norm else 0):
        shapes[f"fc_norm.{number}.weight"] = (config.target_hidden_size,)
    for number in config.further_layers:
        shapes |= _layer_shapes(config, f"layers.{number}.", width=size)
    return shapes


def _layer_shapes(config: DraftConfig, layer: str, *, width: int) -> dict[str, tuple[int, ...]]:
    """Return what all layers have, by full name, for an input of `width`."""
    size, mlp = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (query, width, config.attention_bias),
        "self_attn.k_proj": (key, width, config.attention_bias),
        "self_attn.v_proj": (key, width, config.attention_bias),
        "self_attn.o_proj": (size, query, config.output_bias),
        "mlp.gate_proj": (mlp, size, config.mlp_bias),
        "mlp.up_proj": (mlp, size, config.mlp_bias),
        "mlp.down_proj": (size, mlp, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, has_bias) in matrices.items():
        shapes[f"{layer}{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{layer}{name}.bias"] = (rows,)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        shapes[f"{layer}self_attn.{name}.weight"] = (config.head_dim,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}{name}.weight"] = (size,)
    return shapes


def to_speculators(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors by the names of speculators."""
    return {_numbered(name): tensor for name, tensor in tensors.items()}


def to_serving(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors by the names that engines read; of a plain draft these are our own."""
    norms = {
        name.replace(_INPUT_NORM, _HIDDEN_NORM): tensor.clone()
        for name, tensor in tensors.items()
        if _LAYER.match(name) and name.endswith(_INPUT_NORM)
    }
    return {**to_speculators(tensors), **norms} if norms else dict(tensors)


def _numbered(name: str) -> str:
    if name.startswith(FIRST_LAYER):
        return _NUMBERED_FIRST_LAYER + name.removeprefix(FIRST_LAYER)
    return name


def from_any_layout(name: str) -> str | None:
    """Return our name for a tensor of any layout; None for what is not the draft's own."""
    plain = name.removeprefix(_WRAPPER)
    if plain in _IGNORED or plain.endswith(_BUFFER):
        return None
    for legacy, ours in _LEGACY.items():
        plain = plain.replace(legacy, ours)
    if plain.startswith(_NUMBERED_FIRST_LAYER):
        return FIRST_LAYER + plain.removeprefix(_NUMBERED_FIRST_LAYER)
    return plain


def with_one_input_norm(tensors: Mapping[str, Tensor], location: str) -> dict[str, Tensor]:
    """Return tensors by our names, in which further layers have their norm under one name only.

    Raises:
        MismatchError: the two names have different norms, so that engines would differ.

    """
    kept = dict(tensors)
    for name in tensors:
        if not (_LAYER.match(name) and name.endswith(_HIDDEN_NORM)):
            continue
        ours = name.replace(_HIDDEN_NORM, _INPUT_NORM)
        theirs = kept.pop(name)
        if not kept.setdefault(ours, theirs).equal(theirs):
            raise MismatchError(
                f"{location}: {name} differs from {ours}; SGLang would use the first and vLLM the "
                "second, so this draft is not the same in both; remove the one that training did "
                "not use"
            )
    return kept


def count_layers(names: Collection[str], location: str) -> int:
    """Return the number of decoder layers among names of ours.

    Raises:
        ConfigError: a layer is missing between two others.

    """
    found = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    if found != set(range(1, len(found) + 1)):
        listed = ", ".join(map(str, sorted(found)))
        raise ConfigError(
            f"{location} has the layers 0, {listed}; expected all up to the last: it is not a "
            "complete draft"
        )
    return 1 + len(found)


def require_shapes(
    tensors: Mapping[str, Tensor], config: DraftConfig, *, optional: Iterable[str], location: str
) -> None:
    """Raise unless `tensors` are exactly those of a draft; `optional` ones may be missing.

    Raises:
        MismatchError: a tensor is not part of a draft of this configuration (a bias of `fc`).
        ConfigError: a tensor is missing, or its shape does not match the sizes.

    """
    expected = expected_shapes(config)
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise MismatchError(
            f"{location} has tensors that are not part of the draft: {', '.join(unknown[:6])}; "
            "start from an EAGLE-3 draft of Llama or Qwen3 layers"
        )
    missing = sorted(expected.keys() - tensors.keys() - set(optional))
    if missing:
        raise ConfigError(f"{location} lacks {', '.join(missing[:6])}; it is not a complete draft")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise ConfigError(
                f"{location}: {name} is {tuple(tensor.shape)}, but its config.json requires "
                f"{expected[name]}; the weights and the configuration do not match"
            )
