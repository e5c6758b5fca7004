"""A target's model without weights, on the meta device: its class, layers and attention kernel."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from eagle_core.errors import ConfigError, CorruptError
from eagle_core.target.config import Attention, TargetConfig

if TYPE_CHECKING:  # takes 2 of the 8 seconds before a flow starts; only running a model needs it
    from transformers import PreTrainedModel

_FAILS_FOR_CERTAIN = (
    ImportError,
    ValueError,
    AttributeError,
    LookupError,
    TypeError,
    OSError,
    SafetensorError,
    ArithmeticError,
    AssertionError,
)
_IN_BUILDING = (*_FAILS_FOR_CERTAIN, RuntimeError)
_NUM_CHARACTERS = 200
"""Of a message of transformers, which may list all classes that it knows."""


def build_skeleton(config: TargetConfig, whole: PretrainedConfig) -> "PreTrainedModel":
    """Return the target's model without weights, on the meta device.

    Raises:
        ConfigError: transformers has no such causal language model, or it lacks the attention
            kernel; names those that it has.

    """
    _require_causal(config, whole)
    try:
        return _on_meta(config, whole, config.attention)
    except _IN_BUILDING as error:
        others = [name for name in get_args(Attention) if _can_use(config, whole, name)]
        name, reason = _class_of(whole), reason_of(error)
        if not others:
            raise ConfigError(
                f"target {config.name}: transformers {transformers.__version__} cannot build {name}"
                f" from its config.json; correct it, or choose another target: {reason}"
            ) from error
        raise ConfigError(
            f"target {config.name}: {name} cannot be built with attention {config.attention}; set "
            f"target.attention to {' or '.join(others)}: {reason}"
        ) from error


def reason_of(error: Exception) -> str:
    """Return class and words of an error, in one line of about 200 characters."""
    words = " ".join(str(error).split())
    if len(words) > _NUM_CHARACTERS:
        words = f"{words[:_NUM_CHARACTERS]} ..."
    return f"{type(error).__name__}: {words}"


@contextmanager
def certain(config: TargetConfig, what: str) -> Iterator[None]:
    """Raise whatever would fail again, in any process, as a ConfigError that says `what`."""
    try:
        yield
    except (ConfigError, CorruptError):
        raise
    except _FAILS_FOR_CERTAIN as error:
        raise ConfigError(f"target {config.name}: {what}: {reason_of(error)}") from error


@contextmanager
def silent() -> Iterator[None]:
    """Keep transformers from printing what is said as an error, or what is of no interest."""
    level, has_bar = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _require_causal(config: TargetConfig, whole: PretrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415 (loads torch models)

    brings_code = "AutoModelForCausalLM" in (getattr(whole, "auto_map", None) or {})
    if type(whole) in MODEL_FOR_CAUSAL_LM_MAPPING or (brings_code and config.trust_remote_code):
        return
    raise ConfigError(
        f"target {config.name}: config.json describes {_class_of(whole)}, which transformers "
        f"{transformers.__version__} does not load as a causal language model "
        "(AutoModelForCausalLM); use the text model alone, saved with its own config.json"
    )


def _on_meta(config: TargetConfig, whole: PretrainedConfig, attention: str) -> "PreTrainedModel":
    from transformers.initialization import no_init_weights  # noqa: PLC0415 (loads torch models)

    with silent(), torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(whole),
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.bfloat16,  # some kernels have no other on the meta device
        )
    model.train(mode=False)
    return model


def _can_use(config: TargetConfig, whole: PretrainedConfig, attention: str) -> bool:
    try:
        _on_meta(config, whole, attention)
    except _IN_BUILDING:
        return False
    return True


def _class_of(whole: PretrainedConfig) -> str:
    names = getattr(whole, "architectures", None) or [type(whole).__name__]
    return f"{names[0]} ({whole.model_type})"
