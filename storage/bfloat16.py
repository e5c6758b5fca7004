"""bfloat16 values as uint16 bit patterns: NumPy has no bfloat16 type."""

import numpy as np
from numpy.typing import NDArray

BF16_INFINITY = 0x7F80
"""Exponent all ones: this is infinity, and every larger magnitude is NaN."""
BLOCK_VALUES = 1 << 19
"""Values per block: few NumPy calls, and intermediate results stay in the CPU cache."""


def bf16_to_float(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert bfloat16 bits to float32, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite values to the nearest bfloat16, ties to even; return the bits."""
    wide = np.ascontiguousarray(values).view(np.uint32)
    odd = wide >> 16
    odd &= 1
    odd += wide
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)


def float_to_bf16_up(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round non-negative values up to bfloat16; return the bits."""
    wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((wide + 0xFFFF) >> 16).astype(np.uint16)
