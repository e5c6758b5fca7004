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
VOCABULARY = ("d2t", "t2d")
_LAYER = "midlayer."
_SPECULATORS_LAYER = "layers.0."
_WRAPPER = "model."
_IGNORED = frozenset({"verifier_lm_head.weight", "verifier_norm.weight"})
"""Copies of the target's own tensors that speculators may save with the draft."""


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a draft by name, embedding included."""
    size, mlp = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    norms = range(NUM_AUX_LAYERS if config.fc_norm else 0)
    return {
        **{f"fc_norm.{number}.weight": (config.target_hidden_size,) for number in norms},
        EMBEDDING: (config.vocab_size, size),
        "fc.weight": (size, NUM_AUX_LAYERS * config.target_hidden_size),
        "midlayer.self_attn.q_proj.weight": (query, 2 * size),
        "midlayer.self_attn.k_proj.weight": (key, 2 * size),
        "midlayer.self_attn.v_proj.weight": (key, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, query),
        "midlayer.mlp.gate_proj.weight": (mlp, size),
        "midlayer.mlp.up_proj.weight": (mlp, size),
        "midlayer.mlp.down_proj.weight": (size, mlp),
        "midlayer.hidden_norm.weight": (size,),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.post_attention_layernorm.weight": (size,),
        "norm.weight": (size,),
        "lm_head.weight": (config.draft_vocab_size, size),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }


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
