"""Names and shapes of an EAGLE-3 draft's tensors in the layouts of other tools.

`DraftModel.published_tensors` have the published names (`midlayer.*`), which SGLang, vLLM,
SpecForge and EAGLE use; speculators calls the layer `layers.0`. `d2t` holds offsets everywhere.

Shapes: H draft hidden, Ht target hidden, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.errors import ConfigError, MismatchError

EMBEDDING = "embed_tokens.weight"
"""Optional in every layout: engines share the target's."""
HEAD = "lm_head.weight"
VOCABULARY = ("d2t", "t2d")
_LAYER = "midlayer."
_SPECULATORS_LAYER = "layers.0."
_WRAPPER = "model."
_IGNORED = frozenset({"verifier_lm_head.weight", "verifier_norm.weight"})
"""Copies of the target's own tensors that speculators may save with the draft."""


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a draft by name, embedding included."""
    size, fused = config.hidden_size, NUM_AUX_LAYERS * config.target_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, size),
        "fc.weight": (size, fused),
        **_layer_shapes(config, _LAYER, width=2 * size),
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


def to_speculators(name: str) -> str:
    """Return the speculators name of our tensor `name`."""
    if name.startswith(_LAYER):
        return _SPECULATORS_LAYER + name.removeprefix(_LAYER)
    return name


def from_any_layout(name: str) -> str | None:
    """Return our name for a tensor of any layout; None for a copy of the target's own tensor."""
    plain = name.removeprefix(_WRAPPER)
    if plain in _IGNORED:
        return None
    if plain.startswith(_SPECULATORS_LAYER):
        return _LAYER + plain.removeprefix(_SPECULATORS_LAYER)
    return plain


def require_shapes(
    tensors: Mapping[str, Tensor], config: DraftConfig, *, optional: Iterable[str], location: str
) -> None:
    """Raise unless `tensors` are exactly those of a draft; `optional` ones may be missing.

    Raises:
        MismatchError: a tensor is not part of EAGLE-3 (a bias, a q_norm).
        ConfigError: a tensor is missing, or its shape does not match the sizes.

    """
    expected = expected_shapes(config)
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise MismatchError(
            f"{location} has tensors that are not part of the draft: {', '.join(unknown[:6])}; "
            "only EAGLE-3 and EAGLE-3.1 drafts can be read (no biases, no q_norm)"
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
