"""The dtype of training's matrix products: bfloat16 where the hardware supports it natively."""

import torch

from eagle_core.bfloat16 import DTYPES, multiplies_bfloat16
from eagle_core.training.config import TrainingDtype


def multiplying_dtype(wanted: TrainingDtype, device: torch.device) -> torch.dtype:
    """Return the `wanted` dtype; for "auto" the one that is fast on `device`."""
    if wanted != "auto":
        return DTYPES[wanted]
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in configurations."""
    return str(dtype).removeprefix("torch.")
