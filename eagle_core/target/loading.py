"""Load a target's model, really or as a rehearsal without weights; what does not fit is an error.

transformers gives every weight that it does not find random values, and another one in each
process. So its loading report is an error, by name. A rehearsal runs the same code on the meta
device with the shapes from the files' headers, in seconds for any size.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from eagle_core.bfloat16 import DTYPES
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.safetensors_files import TensorHeader
from eagle_core.target.config import TargetConfig
from eagle_core.target.loading_report import LoadingInfo, report, some
from eagle_core.target.model_config import target_dtype
from eagle_core.target.skeleton import certain, silent

if TYPE_CHECKING:  # takes 2 of the 8 seconds before a flow starts; only running a model needs it
    from transformers import PreTrainedModel

_STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_HALVES = ("_proj_blocks", "_proj_scales")
_BITSANDBYTES_KEYS = ("load_in_4bit", "load_in_8bit")
"""With either, transformers takes bitsandbytes of these bits, whatever method is named."""
logger = logging.getLogger(__name__)


def load_model(config: TargetConfig, folder: Path, *, is_spread: bool = False) -> "PreTrainedModel":
    """Load the weights in `folder` into the target's model, on the CPU or over all visible GPUs.

    Raises:
        ConfigError: transformers cannot load this model, or the GPUs are too small.
        CorruptError: weights are missing, left over, or of another shape; names them.

    """
    with certain(config, f"transformers {transformers.__version__} cannot load {folder}"):
        found: tuple[PreTrainedModel, LoadingInfo] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            folder,
            dtype=target_dtype(config),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            device_map="auto" if is_spread else None,
        )
    loaded, info = found
    if is_spread:
        _require_on_gpus(loaded, config)
    _require_complete(loaded, info, config, folder)
    dtypes = {parameter.dtype for parameter in loaded.parameters()}
    if target_dtype(config) == torch.float32 and dtypes <= set(DTYPES.values()):
        loaded.float()  # type: ignore[no-untyped-call]  # of a dequantised model, some are in the dtype of the file
    return loaded


def rehearse_loading(
    config: TargetConfig,
    whole: PretrainedConfig,
    skeleton: "PreTrainedModel",
    headers: Mapping[str, TensorHeader],
    folder: Path,
) -> "PreTrainedModel | None":
    """Load the tensors of `headers` without their values, through transformers' own key mapping.

    Returns the model as it is after loading, with its quantised modules; None for models whose
    conversion needs values, or that bring their own code: nothing is decided about them.

    Raises:
        ConfigError: the quantisation is unknown, or its package is not installed.
        CorruptError: weights are missing, left over, or of another shape; names them.

    """
    _require_quantisation(config, whole)
    _require_scales(config, headers, folder)
    if skeleton.is_custom_code():
        return None
    try:
        with silent(), certain(config, f"{folder} cannot be loaded"):
            found: tuple[PreTrainedModel, LoadingInfo] = type(skeleton).from_pretrained(  # type: ignore[assignment]
                None,
                config=copy.deepcopy(whole),
                state_dict={name: _meta_tensor(header) for name, header in headers.items()},
                dtype=target_dtype(config),
                attn_implementation=config.attention,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except NotImplementedError as error:  # an operation that has no meta kernel
        logger.debug("the names in %s are compared at loading: %s", folder, error)
        return None
    except RuntimeError as error:
        if getattr(whole, "quantization_config", None) is not None:
            logger.debug("the names in %s are compared at loading: %s", folder, error)
            return None
        raise CorruptError(
            f"target {config.name}: the weights in {folder} do not fit its model: "
            f"{' '.join(str(error).split())}; {_remedy(folder)}"
        ) from error
    model, info = found
    _require_complete(model, info, config, folder)
    return model


def _require_on_gpus(model: "PreTrainedModel", config: TargetConfig) -> None:
    places: Mapping[str, object] = model.hf_device_map  # type: ignore[assignment]
    elsewhere = [name for name, place in places.items() if place in {"cpu", "disk"}]
    if elsewhere:
        raise ConfigError(
            f"target {config.name} does not fit on the visible GPUs: {some(elsewhere)} would stay "
            "in main memory; set target.placement to streamed"
        )


def _require_complete(
    model: "PreTrainedModel",
    info: LoadingInfo,
    config: TargetConfig,
    folder: Path,
) -> None:
    found = report(model, info)
    if found.ignored:
        logger.info("%s: not needed for the states: %s", folder, some(found.ignored))
    faults = found.faults()
    if faults:
        raise CorruptError(
            f"target {config.name}: {folder} does not hold the weights of {type(model).__name__}: "
            f"{faults}; {_remedy(folder)}"
        )


def _remedy(folder: Path) -> str:
    return (
        f"correct config.json, or replace the weights: `hf download ORG/MODEL --local-dir {folder}`"
    )


def _require_quantisation(config: TargetConfig, whole: PretrainedConfig) -> None:
    """Refuse a method that transformers does not know: it would ignore it."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # noqa: PLC0415 (slow)

    found = getattr(whole, "quantization_config", None)
    if found is None:
        return
    document = found if isinstance(found, dict) else found.to_dict()
    method = document.get("quant_method")
    known = {str(getattr(name, "value", name)) for name in AUTO_QUANTIZER_MAPPING}
    name = str(getattr(method, "value", method))
    is_of_bits = any(document.get(key) for key in _BITSANDBYTES_KEYS)
    if name not in known and not is_of_bits:
        raise ConfigError(
            f"target {config.name}: transformers {transformers.__version__} does not know the "
            f"quantization method {name} of config.json; use weights that are not quantized, or a "
            f"method of these: {', '.join(sorted(known))}"
        )


def _require_scales(
    config: TargetConfig, headers: Mapping[str, TensorHeader], folder: Path
) -> None:
    """Refuse 8-bit floats without their scales, which transformers would read as they are.

    Of the 4-bit floats of `mxfp4`, it loads no half without the other, and says nothing.
    """
    is_scaled = any(name.endswith(".weight_scale_inv") for name in headers)
    lacking = [
        _other_half(name)
        for name in headers
        if name.endswith(_HALVES) and _other_half(name) not in headers
    ]
    lacking += [
        f"{name}_scale_inv"
        for name, header in headers.items()
        if is_scaled and header.dtype.startswith("F8") and name.endswith(".weight")
        if f"{name}_scale_inv" not in headers
    ]
    if lacking:
        raise CorruptError(
            f"target {config.name}: {folder} has no scales or blocks {some(lacking)}; "
            f"{_remedy(folder)}"
        )


def _other_half(name: str) -> str:
    blocks, scales = _HALVES
    stem = name.removesuffix(blocks).removesuffix(scales)
    return f"{stem}{scales if name.endswith(blocks) else blocks}"


def _meta_tensor(header: TensorHeader) -> torch.Tensor:
    dtype = _STORED_DTYPES.get(header.dtype, torch.uint8)
    return torch.empty(header.shape, dtype=dtype, device="meta")
