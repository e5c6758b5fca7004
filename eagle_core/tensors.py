"""bfloat16 between torch tensors and the uint16 bit patterns that NumPy and the store can hold."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_bfloat16_bits(tensor: Tensor) -> NDArray[np.uint16]:
    """Return `tensor` rounded to bfloat16 as uint16 bit patterns of the same shape."""
    rounded = tensor.detach().to(torch.bfloat16).contiguous().cpu()
    return rounded.view(torch.uint16).numpy()


def from_bfloat16_bits(bits: NDArray[np.uint16], *, dtype: torch.dtype) -> Tensor:
    """Return the values whose bfloat16 bit patterns are `bits`, as `dtype`; exact for float32."""
    own = np.ascontiguousarray(bits)
    if not own.flags.writeable:  # torch has no read-only tensors
        own = own.copy()
    return torch.from_numpy(own).view(torch.bfloat16).to(dtype)


def widened(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or as it is if that is wider: for sums and exponentials."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
