"""The model configuration next to a target's weights: shape, layers, stop tokens."""

from itertools import pairwise
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    PretrainedConfig,
)

from eagle_core.bfloat16 import DTYPES, multiplies_bfloat16
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.skeleton import reason_of

_OF_ODD_VALUES = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


def aux_layers(config: TargetConfig, num_layers: int) -> tuple[int, int, int]:
    """Return the captured decoder layers, 0-based, low to high."""
    layers = config.aux_layers or default_aux_layers(num_layers)
    if not are_aux_layers(layers, num_layers):
        raise ConfigError(
            f"target {config.name}: aux layers {layers} must ascend within 0..{num_layers - 1} "
            f"(the model has {num_layers} layers); set target.aux_layers"
        )
    return layers


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the decoder layers that EAGLE-3 captures; no valid ones for fewer than 7 layers."""
    return 1, num_layers // 2 - 1, num_layers - 4


def are_aux_layers(layers: tuple[int, ...], num_layers: int) -> bool:
    """Return whether these are three layers of a model of `num_layers` layers, ascending."""
    ascends = all(low < high for low, high in pairwise((-1, *layers, num_layers)))
    return ascends and len(layers) == len(default_aux_layers(num_layers))


def resolve_device(device: str) -> torch.device:
    """Return the torch device; `auto` is CUDA if available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def target_dtype(config: TargetConfig) -> torch.dtype:
    """Return the arithmetic of a target; `auto` is what is fast on its device."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    is_fast = multiplies_bfloat16(resolve_device(config.device))
    return torch.bfloat16 if is_fast else torch.float32


def with_dtype(config: TargetConfig, name: str | None = None) -> TargetConfig:
    """Return a target whose dtype is decided: as set, else `name`, else what is fast here."""
    if config.dtype != "auto":
        return config
    decided = name or str(target_dtype(config)).removeprefix("torch.")
    return config.model_copy(update={"dtype": decided})


def for_decoding(config: TargetConfig) -> TargetConfig:
    """Return a target whose dtype is decided for decoding.

    If it is left open, that is float32 on a CPU: rounding then changes no text, so that texts of
    speculative and of plain decoding can be compared.
    """
    on_cpu = resolve_device(config.device).type == "cpu"
    return with_dtype(config, "float32" if on_cpu else None)


def read_model_config(config: TargetConfig, folder: Path) -> PretrainedConfig:
    """Return the text model's configuration from the weights folder.

    Raises:
        ConfigError: transformers rejects it; the message includes its reason.

    """
    text_config: PretrainedConfig = read_whole_config(config, folder).get_text_config()
    return text_config


def read_whole_config(config: TargetConfig, folder: Path) -> PretrainedConfig:
    try:
        loaded: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except (StrictDataclassError, OSError, *_OF_ODD_VALUES) as error:
        raise ConfigError(
            f"target {config.name}: transformers {transformers.__version__} rejects "
            f"{folder / 'config.json'}; correct that file (a key that is null can be removed), or "
            f"install a transformers version that supports this model: {reason_of(error)}"
        ) from error
    return loaded
