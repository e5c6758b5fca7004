"""bfloat16 as its bit pattern in uint16: NumPy has no such type."""

import numpy as np
from numpy.typing import NDArray

BF16_INFINITY = 0x7F80
"""Exponent all ones: infinity, and above it every NaN."""
BLOCK_VALUES = 1 << 19
"""Values handled at a time: few calls of NumPy, and what they pass on is still in a cache."""


def bf16_to_float(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits: exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 of finite values, ties to even."""
    wide = np.ascontiguousarray(values).view(np.uint32)
    odd = wide >> 16
    odd &= 1
    odd += wide
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)


def float_to_bf16_up(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the smallest bfloat16 not below non-negative values."""
    wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((wide + 0xFFFF) >> 16).astype(np.uint16)
