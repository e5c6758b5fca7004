"""bfloat16: as the uint16 bit patterns that NumPy and the store can hold, and where it is fast."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.errors import CorruptError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has units for bfloat16 products; without, they are far slower."""
    if device.type == "cuda":
        has_units: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return has_units
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False


def to_bfloat16_bits(tensor: Tensor) -> NDArray[np.uint16]:
    """Return `tensor` rounded to bfloat16 as uint16 bit patterns of the same shape."""
    rounded = tensor.detach().to(torch.bfloat16).contiguous().cpu()
    return rounded.view(torch.uint16).numpy()


def from_bfloat16_bits(bits: NDArray[np.uint16], *, dtype: torch.dtype) -> Tensor:
    """Return the values whose bfloat16 bit patterns are `bits`, as `dtype`; exact for float32."""
    array = np.ascontiguousarray(bits)
    if not array.flags.writeable:  # torch has no read-only tensors
        array = array.copy()
    return torch.from_numpy(array).view(torch.bfloat16).to(dtype)


def widened(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or unchanged if it is float64: for sums and exponentials."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def require_finite(tensors: Mapping[str, Tensor], *, where: str, cure: str) -> None:
    """Raise CorruptError naming the tensors that contain NaN or infinity, and the remedy."""
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CorruptError(f"{where}: not finite: {', '.join(bad[:3])}{more}; {cure}")
