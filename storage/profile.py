"""How hidden states become arrays: `raw`, `lossless` or `int8`. Pure NumPy, no bytes, no files.

Shapes: R rows, L layers (absent for the last hidden state), H hidden size; states are bfloat16 bits
in uint16. Every profile is a set of plain arrays that any Zarr reader opens.

`lossless`: rotate each 16-bit pattern left by one; its high byte is then the exponent, its low byte
mantissa and sign. From the exponents the channel's typical exponent is subtracted modulo 256, which
leaves about 2.7 bits of entropy of 8.

`int8`: `q * step[row, group] * scale[channel]`. A scale per row alone would erase channels: one
channel often carries most of a row's energy.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from storage.arrays import StoredArray, row_chunk
from storage.zstd import EntropyZstd

CALIBRATION_ROWS = 512
GROUP_CHANNELS = 64
SCALE_POWER = 0.75  # 1 is equal relative error in all channels; between is a smaller teacher KL
BLOCK_ROWS = 64  # small enough that a block's temporaries stay in the processor's cache
PLANE_BYTES = 1 << 20

Bits = NDArray[np.uint16]


def encode_states(profile: str, name: str, bits: Bits) -> Iterator[StoredArray]:
    """Yield the arrays that hold `bits` [R, (L,) H] under a profile."""
    if profile == "raw":
        yield StoredArray(
            name=name,
            values=bits,
            dimension_names=_dimensions(bits),
            inner_chunk=row_chunk(bits),
            compressors=(),
        )
    elif profile == "lossless":
        yield from _encode_lossless(name, bits)
    else:
        yield from _encode_int8(name, bits)


def decode_states(profile: str, name: str, arrays: Mapping[str, NDArray[np.generic]]) -> Bits:
    """Return the bits that `encode_states` was given; with `int8`, the nearest it can say."""
    if profile == "raw":
        return arrays[name].astype(np.uint16, copy=False)
    if profile == "lossless":
        return _decode_lossless(name, arrays)
    return _decode_int8(name, arrays)


def _encode_lossless(name: str, bits: Bits) -> Iterator[StoredArray]:
    typical = _typical_exponents(bits)
    exponents = np.empty(bits.shape, np.uint8)
    mantissas = np.empty(bits.shape, np.uint8)
    for rows in _blocks(len(bits)):
        rotated = bits[rows] << 1
        rotated |= bits[rows] >> 15
        np.subtract((rotated >> 8).astype(np.uint8), typical, out=exponents[rows])
        mantissas[rows] = rotated  # the cast keeps the low byte
    yield _calibration(f"{name}_typical_exponents", typical)
    yield _plane(f"{name}_exponents", exponents)
    yield _plane(f"{name}_mantissas", mantissas)


def _decode_lossless(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> Bits:
    typical = arrays[f"{name}_typical_exponents"]
    exponents = arrays[f"{name}_exponents"]
    mantissas = arrays[f"{name}_mantissas"]
    bits = np.empty(exponents.shape, np.uint16)
    for rows in _blocks(len(bits)):
        rotated = np.add(exponents[rows], typical, dtype=np.uint8).astype(np.uint16)
        rotated <<= 8
        rotated |= mantissas[rows]
        np.right_shift(rotated, 1, out=bits[rows])
        rotated <<= 15
        bits[rows] |= rotated
    return bits


def _typical_exponents(bits: Bits) -> NDArray[np.uint8]:
    """Return [(L,) H] the commonest exponent of each channel among some rows."""
    channels = int(np.prod(bits.shape[1:]))
    sample = bits[:: max(1, len(bits) // CALIBRATION_ROWS)].reshape(-1, channels)
    exponents = (sample >> 7) & 0xFF
    cells = exponents + (np.arange(channels, dtype=np.int64) << 8)
    counts = np.bincount(cells.ravel(), minlength=channels << 8).reshape(channels, 256)
    typical: NDArray[np.uint8] = counts.argmax(axis=1).astype(np.uint8)
    return typical.reshape(bits.shape[1:])


def _encode_int8(name: str, bits: Bits) -> Iterator[StoredArray]:
    scale = _channel_scale(bits)
    codes = np.empty(bits.shape, np.int8)
    groups = -(-bits.shape[-1] // GROUP_CHANNELS)
    steps = np.empty((*bits.shape[:-1], groups), np.uint16)
    starts = np.arange(0, bits.shape[-1], GROUP_CHANNELS)
    for rows in _blocks(len(bits)):
        scaled = np.divide(bf16_to_float(bits[rows]), scale, dtype=np.float32)
        largest = np.maximum.reduceat(np.abs(scaled), starts, axis=-1)
        steps[rows] = _float_to_bf16_up((largest / 127).astype(np.float32))
        wide = _spread(bf16_to_float(steps[rows]), bits.shape[-1])
        codes[rows] = np.rint(scaled / np.where(wide == 0, 1, wide))
    yield _calibration(f"{name}_channel_scale", scale)
    yield _plane(f"{name}_steps", steps)
    yield _plane(f"{name}_codes", codes)


def _decode_int8(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> Bits:
    scale = arrays[f"{name}_channel_scale"].astype(np.float32, copy=False)
    codes = arrays[f"{name}_codes"].astype(np.int8, copy=False)
    steps = arrays[f"{name}_steps"].astype(np.uint16, copy=False)
    bits = np.empty(codes.shape, np.uint16)
    for rows in _blocks(len(bits)):
        wide = _spread(bf16_to_float(steps[rows]), codes.shape[-1])
        bits[rows] = float_to_bf16((codes[rows] * wide * scale).astype(np.float32))
    return bits


def _channel_scale(bits: Bits) -> NDArray[np.float32]:
    """Return [(L,) H] root mean square of each channel over some rows, to a power; never zero."""
    sample = bf16_to_float(bits[:: max(1, len(bits) // CALIBRATION_ROWS)]).astype(np.float64)
    mean_square = np.square(sample).mean(axis=0) if len(sample) else np.ones(bits.shape[1:])
    return np.maximum(np.sqrt(mean_square) ** SCALE_POWER, 1e-6).astype(np.float32)


def bf16_to_float(bits: Bits) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(values: NDArray[np.float32]) -> Bits:
    """Return the bits of the nearest bfloat16 of finite values, ties to even."""
    wide = np.ascontiguousarray(values).view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def _float_to_bf16_up(values: NDArray[np.float32]) -> Bits:
    """Return the bits of the smallest bfloat16 not below non-negative values."""
    wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((wide + 0xFFFF) >> 16).astype(np.uint16)


def _spread(steps: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    return np.repeat(steps, GROUP_CHANNELS, axis=-1)[..., :channels]


def _blocks(rows: int) -> Iterator[slice]:
    for first in range(0, rows, BLOCK_ROWS):
        yield slice(first, first + BLOCK_ROWS)


def _plane(name: str, values: NDArray[np.generic]) -> StoredArray:
    """Return a plane whose inner chunks hold one layer each: layers have their own statistics."""
    layers = values.shape[1:-1]
    rows = max(1, PLANE_BYTES // (values.shape[-1] * values.itemsize))
    return StoredArray(
        name=name,
        values=values,
        dimension_names=_dimensions(values),
        inner_chunk=(max(1, min(rows, len(values))), *(1 for _ in layers), values.shape[-1]),
        compressors=(EntropyZstd(level=1),),
    )


def _calibration(name: str, values: NDArray[np.generic]) -> StoredArray:
    return StoredArray(
        name=name,
        values=values,
        dimension_names=("layer", "hidden")[-values.ndim :],
        inner_chunk=values.shape,
    )


def _dimensions(values: NDArray[np.generic]) -> tuple[str, ...]:
    return ("token", "hidden") if values.ndim == 2 else ("token", "layer", "hidden")
