"""The configuration of a given draft, from its config.json and its tensors.

Tensors decide where they can. What a configuration leaves out is taken where the meaning is clear,
and logged; a configuration that contradicts the tensors is refused, and both are named.

Names of tensors are ours (`eagle_core.draft.layout`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig

from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.draft.export import TARGET_HEAD
from eagle_core.draft.layout import EMBEDDING, FIRST_LAYER, HEAD, INPUT_NORM, count_layers
from eagle_core.errors import ConfigError, MismatchError

CONFIG_NAME = "config.json"
_FC = "fc.weight"
_ATTENTION = f"{FIRST_LAYER}self_attn."
_QUERY, _KEY = f"{_ATTENTION}q_proj.weight", f"{_ATTENTION}k_proj.weight"
_LLAMA = frozenset({"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"})
_QWEN3 = "Eagle3Qwen3ForCausalLM"
_SLIDING = "sliding_attention"
_PLAIN_ROPE = ("default", "mrope")
"""For text, mrope is the plain embedding: a token has the same position in all its sections."""
_MROPE_KEYS = ("mrope_section", "mrope_interleaved")
_UNKNOWN_FLAGS: Mapping[str, object] = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "eh_proj_before_attn": False,
    "eh_proj_bias": False,
    "parallel_draft_step": 1,
}
"""Settings of ModelOpt and TensorRT-LLM, with the only values that our draft has."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """What a folder says about its draft."""

    document: Mapping[str, Any]
    layer: Mapping[str, Any]
    """Of the decoder layers: `transformer_layer_config`, or the document itself."""
    eagle: Mapping[str, Any]
    """`eagle_config` of layout serving."""
    tensors: Mapping[str, Tensor]
    location: str

    @property
    def is_speculators(self) -> bool:
        return self.layer is not self.document

    def flag(self, *names: str) -> bool | None:
        """Return what the configuration says under any of these names; None if it does not."""
        for source in (self.eagle, self.document, self.layer):
            for name in names:
                if isinstance(source.get(name), bool):
                    return bool(source[name])
        return None

    def has(self, suffix: str) -> bool:
        return any(name.endswith(suffix) for name in self.tensors)

    def agreed(self, key: str, *, tensor: str) -> bool:
        """Return whether the draft has what `key` switches on, by its tensors.

        Raises:
            MismatchError: the configuration says otherwise.

        """
        said, has = self.flag(key), self.has(tensor)
        if said is None and has:
            logger.info(
                "%s: %s does not name %s, but the weights have it", self.location, CONFIG_NAME, key
            )
        if said is not None and said != has:
            raise _contradiction(self, f"{key} {str(said).lower()}", f"*{tensor}", has=has)
        return has

    def integer(self, key: str, found: int | None = None) -> int:
        """Return a size from the configuration, or else what the tensors say."""
        value = self.layer.get(key)
        value = found if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{self.location}: {CONFIG_NAME} has no integer above 0 for {key}; write it there"
            )
        return value

    def real(self, key: str, default: float) -> float:
        value = self.layer.get(key)
        return float(value) if isinstance(value, int | float) else default


def imported_config(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor], location: str
) -> DraftConfig:
    """Return the configuration of the draft with these tensors, by our names.

    Raises:
        ConfigError: a size is missing or contradicts the tensors.
        MismatchError: our draft has no such variant, or it cannot be known which variant it is.

    """
    layer = document.get("transformer_layer_config") or document
    eagle = document.get("eagle_config")
    given = _Given(
        document=document,
        layer=layer,
        eagle=eagle if isinstance(eagle, Mapping) else {},
        tensors=tensors,
        location=location,
    )
    _refuse_unknown(given)
    try:
        return DraftConfig(**_sizes(given), **_variants(given))
    except ValidationError as error:
        facts = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise MismatchError(f"{location}: {facts}; start from another draft") from error


def _refuse_unknown(given: _Given) -> None:
    unknown = {
        name: value
        for name, known in _UNKNOWN_FLAGS.items()
        if (value := given.eagle.get(name, given.document.get(name))) is not None and value != known
    }
    if unknown:
        facts = ", ".join(f"{name} {value}" for name, value in unknown.items())
        raise MismatchError(
            f"{given.location} has {facts}, which our draft does not have; start from another draft"
        )


def _sizes(given: _Given) -> dict[str, Any]:
    """Return the sizes, from the tensors where possible, else from the configuration."""
    hidden_size, fused = given.tensors[_FC].shape
    _require_said(given, "hidden_size", hidden_size, _FC)
    wide = given.document.get("target_hidden_size") or given.layer.get("target_hidden_size")
    if fused % NUM_AUX_LAYERS or (isinstance(wide, int) and wide * NUM_AUX_LAYERS != fused):
        said = f"target_hidden_size {wide} in {CONFIG_NAME}" if wide else "no target_hidden_size"
        raise MismatchError(
            f"{given.location}: fc.weight reads {fused} channels, with {said}; expected "
            f"{NUM_AUX_LAYERS} aux states of the target's width"
        )
    num_heads, head_dim = _heads(given)
    gate = given.tensors.get(f"{FIRST_LAYER}mlp.gate_proj.weight")
    key = given.tensors.get(_KEY)
    return {
        "hidden_size": hidden_size,
        "target_hidden_size": fused // NUM_AUX_LAYERS,
        "intermediate_size": given.integer(
            "intermediate_size", None if gate is None else len(gate)
        ),
        "num_attention_heads": num_heads,
        "num_key_value_heads": given.integer(
            "num_key_value_heads", None if key is None else len(key) // head_dim
        ),
        "head_dim": head_dim,
        **_vocabulary_sizes(given),
        "rms_norm_eps": given.real("rms_norm_eps", 1e-5),
        "max_position_embeddings": given.integer("max_position_embeddings", 2048),
        "num_hidden_layers": _num_layers(given),
    }


def _heads(given: _Given) -> tuple[int, int]:
    """Return number and size of the heads; one of them may be missing."""
    query = given.tensors.get(_QUERY)
    rows = 0 if query is None else len(query)
    said = given.layer.get("head_dim")
    if given.layer.get("num_attention_heads") is None and isinstance(said, int) and said > 0:
        return rows // said, said
    num_heads = given.integer("num_attention_heads")
    return num_heads, given.integer("head_dim", rows // num_heads)


def _vocabulary_sizes(given: _Given) -> dict[str, int]:
    """Return V and D; without a head of its own, a draft has the target's vocabulary."""
    known = (given.tensors.get(name) for name in (EMBEDDING, "t2d"))
    vocab_size = given.integer(
        "vocab_size", next((len(tensor) for tensor in known if tensor is not None), None)
    )
    head, said = given.tensors.get(HEAD), given.document.get("draft_vocab_size")
    if head is None and ("d2t" in given.tensors or said not in {None, vocab_size}):
        raise ConfigError(
            f"{given.location} lacks {HEAD}, and has a vocabulary of its own; it is not a complete "
            "draft: only one over the target's whole vocabulary can share the target's head"
        )
    draft_vocab_size = vocab_size if head is None else len(head)
    _require_said(given, "draft_vocab_size", draft_vocab_size, HEAD, source=given.document)
    return {"vocab_size": vocab_size, "draft_vocab_size": draft_vocab_size}


def _num_layers(given: _Given) -> int:
    """Count the layers from the weights: some configurations give the target's number."""
    found = count_layers(given.tensors.keys(), given.location)
    said = given.layer.get("num_hidden_layers")
    if isinstance(said, int) and said > found:
        logger.info(
            "%s: %s says %d layers; the weights have %d, and that is taken",
            *(given.location, CONFIG_NAME, said, found),
        )
    elif isinstance(said, int) and said < found:
        raise _contradiction(given, f"num_hidden_layers {said}", f"{found} layers", has=True)
    most = 4
    if found > most:
        raise MismatchError(
            f"{given.location} has {found} layers; our draft has at most {most}: start from "
            "another draft"
        )
    return found


def _variants(given: _Given) -> dict[str, Any]:
    return {
        "rope_theta": _rope_theta(given),
        "rope_scaling": _rope_scaling(given),
        "attention_bias": given.agreed("attention_bias", tensor="self_attn.q_proj.bias"),
        "mlp_bias": given.agreed("mlp_bias", tensor="mlp.gate_proj.bias"),
        "qk_norm": _qk_norm(given),
        "sliding_window": _sliding_window(given),
        "fc_norm": _fc_norm(given),
        "norm_output": given.flag("norm_output", "return_hidden_post_norm") or False,
        "norm_before_fc": given.agreed("norm_before_fc", tensor=INPUT_NORM),
        "norm_before_residual": _norm_before_residual(given),
        "target_head": HEAD not in given.tensors or given.flag(TARGET_HEAD) is True,
    }


def _fc_norm(given: _Given) -> bool:
    said, has = given.flag("fc_norm", "use_aux_norm"), given.has("fc_norm.0.weight")
    if said is not None and said != has:
        raise _contradiction(given, f"fc_norm {str(said).lower()}", "fc_norm.0.weight", has=has)
    return has


def _qk_norm(given: _Given) -> bool:
    """Return whether queries and keys are normed; the class that engines load must agree."""
    has = given.has("self_attn.q_norm.weight")
    classes = set(given.document.get("architectures") or ())
    model_type = given.layer.get("model_type")
    of_class = None if given.is_speculators or not classes & _LLAMA else False
    if _QWEN3 in classes and not given.is_speculators:
        of_class = True
    is_qwen3 = model_type == "qwen3"
    if has and not is_qwen3 and not of_class and (of_class is False or model_type is not None):
        said = f"model_type {model_type}, architectures {sorted(classes)}"
        raise _contradiction(given, said, "*self_attn.q_norm.weight", has=True)
    if not has and (of_class or (is_qwen3 and of_class is None)):
        said = f"model_type {model_type}, architectures {sorted(classes)}"
        raise _contradiction(given, said, "*self_attn.q_norm.weight", has=False)
    return has


def _norm_before_residual(given: _Given) -> bool:
    said = given.flag("norm_before_residual")
    if said is None and given.is_speculators:
        logger.info(
            "%s: %s does not name norm_before_residual; taken as true, as vLLM reads this layout",
            *(given.location, CONFIG_NAME),
        )
        return True
    return bool(said)


def _sliding_window(given: _Given) -> int | None:
    """Return W, if engines use a window: they go by `layer_types`."""
    window = given.layer.get("sliding_window")
    types = given.layer.get("layer_types")
    num_layers = count_layers(given.tensors.keys(), given.location)
    if isinstance(types, Sequence) and not isinstance(types, str) and types:
        own = [str(one) for one in types[:num_layers]]
        if len(own) < num_layers or len(set(own)) > 1:
            raise MismatchError(
                f"{given.location}: layer_types is {list(types)} for {num_layers} layers; our "
                "draft has the same attention in all layers: start from another draft"
            )
        if own[0] != _SLIDING:
            return None
        return given.integer("sliding_window")
    if window is None or given.layer.get("use_sliding_window") is False:
        return None
    if given.layer.get("use_sliding_window"):
        raise MismatchError(
            f"{given.location}: {CONFIG_NAME} has use_sliding_window but no layer_types, so that "
            f"engines would use no window; write layer_types: one {_SLIDING} or full_attention for "
            "each layer, as it was trained"
        )
    logger.info(
        "%s: sliding_window %s is ignored, as engines ignore it without layer_types",
        *(given.location, window),
    )
    return None


def _rope(given: _Given) -> Mapping[str, Any]:
    for key in ("rope_parameters", "rope_scaling"):
        rope = given.layer.get(key)
        if isinstance(rope, Mapping):
            nested = [one for one in rope.values() if isinstance(one, Mapping)]
            if not nested:
                return rope
            if any(one != nested[0] for one in nested):
                raise MismatchError(
                    f"{given.location}: {key} differs between kinds of attention; our draft has "
                    "the same in all layers: start from another draft"
                )
            return nested[0]
    return {}


def _rope_theta(given: _Given) -> float:
    theta = _rope(given).get("rope_theta", given.layer.get("rope_theta"))
    if isinstance(theta, int | float):
        return float(theta)
    model_type = given.layer.get("model_type") or "llama"
    default = 10000.0
    if model_type in {"llama", "qwen3"}:
        default = float(AutoConfig.for_model(model_type).rope_parameters["rope_theta"])
    logger.info(
        "%s: %s does not name rope_theta; taken as %g, the default of %s",
        *(given.location, CONFIG_NAME, default, model_type),
    )
    return default


def _rope_scaling(given: _Given) -> dict[str, Any] | None:
    """Return the scaling without rope_theta, as far as our configuration checks it itself."""
    scaling = {
        key: value
        for key, value in _rope(given).items()
        if value is not None and key != "rope_theta"
    }
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in _PLAIN_ROPE:
        plain = {"rope_type", "type", *_MROPE_KEYS}
        if scaling.keys() <= plain:
            return None
    length = "original_max_position_embeddings"
    if kind in {"yarn", "longrope", "llama3"} and isinstance(given.layer.get(length), int):
        scaling.setdefault(length, given.layer[length])
    return scaling


def _require_said(
    given: _Given,
    key: str,
    found: int,
    tensor: str,
    *,
    source: Mapping[str, Any] | None = None,
) -> None:
    said = (given.layer if source is None else source).get(key)
    if isinstance(said, int) and said != found:
        raise MismatchError(
            f"{given.location}: {CONFIG_NAME} has {key} {said}, but the weights have {found} "
            f"({tensor}); correct the one that is wrong"
        )


def _contradiction(given: _Given, said: str, tensor: str, *, has: bool) -> MismatchError:
    return MismatchError(
        f"{given.location}: {CONFIG_NAME} says {said}, but the weights "
        f"{'have' if has else 'lack'} {tensor}; correct the one that is wrong"
    )
