"""How hidden states become arrays: `raw`, `lossless`, `int8`, `int6` or `int4`.

Shapes: R rows, L layers (absent for the last hidden state), H hidden size, G groups of 64 channels;
states are bfloat16 bits in uint16. Every profile is a set of plain Zarr arrays whose inner chunks
hold one layer each. A chunk is split, coded and forgotten while it is in the processor's cache.

`lossless`: one byte is the exponent, the other sign and mantissa, like an integer of 8 bits:
widening it puts the sign where it belongs. From the exponents the channel's typical exponent
is subtracted modulo 256, which leaves about 2.7 bits of entropy of 8.

`int8`, `int6`, `int4`: `code * step[row, group] * scale[channel] + mean[channel]`. A scale per row
alone would erase channels: one channel often carries most of a row's energy.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from storage.encoding import zstd
from storage.encoding.state_rows import BLOCK_VALUES, Bits, StateRows
from storage.encoding.zarr_arrays import (
    ArrayLayout,
    LoadedArray,
    OpenObject,
    write_array,
    write_small,
)
from storage.objects.buffer_pool import Allocate

CALIBRATION_ROWS = 256
GROUP_CHANNELS = 64
EXPONENT_UNIT = np.uint16(1 << 7)
SIGN_AND_MANTISSA = np.uint16(0x807F)
SCALE_POWER = 0.75  # 1 is equal relative error in all channels; between is a smaller teacher KL
CHUNK_VALUES = 1 << 22  # large enough that whole samples, which may begin alike, share a chunk
LARGEST_CODE = {"int8": 127, "int6": 31, "int4": 7}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """One inner chunk of all arrays of a set of states: some rows of one layer."""

    position: tuple[int, ...]
    """In the grid."""
    layer: tuple[Any, ...]
    first: int
    stop: int


def write_states(profile: str, name: str, rows: StateRows, open_object: OpenObject) -> None:
    """Write the arrays that hold `rows` under a profile."""
    if profile == "raw":
        _write_raw(name, rows, open_object)
    elif profile == "lossless":
        _write_lossless(name, rows, open_object)
    else:
        _write_codes(name, rows, open_object, largest=LARGEST_CODE[profile])


def decode_states(
    profile: str, name: str, arrays: Mapping[str, LoadedArray], allocate: Allocate = np.empty
) -> Bits:
    """Return the bits [R, (L,) H] that were encoded; with int profiles, the nearest these can say.

    Rows of one layer lie side by side in memory, not layers of one row.

    Raises:
        KeyError: an array is absent.
        ValueError: the arrays do not fit each other, or a chunk does not decode.

    """
    if profile == "raw":
        return _decode_raw(arrays[name], allocate)
    if profile == "lossless":
        return _decode_lossless(name, arrays, allocate)
    return _decode_codes(name, arrays, allocate)


# ---- raw


def _write_raw(name: str, rows: StateRows, open_object: OpenObject) -> None:
    bits = _padded_chunk(rows.shape, np.uint16)
    layout = _layout(name, rows.shape, np.uint16, compressed=False)
    with write_array(layout, open_object) as writer:
        for chunk in _chunks(rows.shape):
            bits[chunk.stop - chunk.first :] = 0
            for at, block in rows.blocks(chunk.first, chunk.stop, chunk.layer):
                bits[at] = block
            writer.append(bits.tobytes())


def _decode_raw(coded: LoadedArray, allocate: Allocate) -> Bits:
    bits = _empty_by_layer(coded.layout.shape, allocate)
    scratch = coded.scratch()
    for chunk in _chunks_of(coded):
        values = coded.chunk(chunk.position, scratch).reshape(-1, bits.shape[-1])
        rows = bits[chunk.first : chunk.stop][(slice(None), *chunk.layer)]
        rows[...] = values[: len(rows)]
    return bits


# ---- lossless


def _write_lossless(name: str, rows: StateRows, open_object: OpenObject) -> None:
    """Write one array after the other, each from all rows: two halves at a time need two files."""
    typical = _typical_exponents(rows)
    _write_calibration(f"{name}_typical_exponents", typical, open_object)

    def exponents(bits: Bits, plane: NDArray[np.uint8], layer: tuple[Any, ...]) -> None:
        bits += bits  # faster than a shift
        bits >>= 8
        plane[...] = bits
        plane -= typical[layer]

    def mantissas(bits: Bits, plane: NDArray[np.uint8], _layer: tuple[Any, ...]) -> None:
        bits &= SIGN_AND_MANTISSA
        plane[...] = bits  # the cast keeps the low byte
        bits >>= 8
        plane |= bits.astype(np.uint8)

    _write_plane(f"{name}_exponents", rows, exponents, zstd.ENTROPY_ONLY, open_object)
    _write_plane(f"{name}_mantissas", rows, mantissas, zstd.REPEATED_ROWS, open_object)


def _write_plane(
    name: str,
    rows: StateRows,
    split: Callable[[Bits, NDArray[np.uint8], tuple[Any, ...]], None],
    parameters: zstandard.ZstdCompressionParameters,
    open_object: OpenObject,
) -> None:
    """Write one byte of each value: what `split` puts into a plane for bits that it may change."""
    (values,) = _temporaries(rows.shape[-1], np.uint16, 1)
    plane = _padded_chunk(rows.shape, np.uint8)
    frames = zstd.Frames(parameters)
    with write_array(_layout(name, rows.shape, np.uint8), open_object) as writer:
        for chunk in _chunks(rows.shape):
            plane[chunk.stop - chunk.first :] = 0
            for at, bits in rows.blocks(chunk.first, chunk.stop, chunk.layer):
                block = values[: len(bits)]
                block[...] = bits  # all else is faster on contiguous rows
                split(block, plane[at], chunk.layer)
            writer.append(frames.compress(plane))


def _decode_lossless(name: str, arrays: Mapping[str, LoadedArray], allocate: Allocate) -> Bits:
    coded_exponents, coded_mantissas = arrays[f"{name}_exponents"], arrays[f"{name}_mantissas"]
    typical = arrays[f"{name}_typical_exponents"].whole().astype(np.uint8)
    bits = _empty_by_layer(coded_exponents.layout.shape, allocate)
    hidden = bits.shape[-1]
    exponent_plane, mantissa_plane = coded_exponents.scratch(), coded_mantissas.scratch()
    values, others = _temporaries(hidden, np.uint16, 2)
    for chunk in _chunks_of(coded_exponents, coded_mantissas):
        exponents = coded_exponents.chunk(chunk.position, exponent_plane).reshape(-1, hidden)
        mantissas = coded_mantissas.chunk(chunk.position, mantissa_plane).reshape(-1, hidden)
        signed = mantissas.view(np.int8)
        for at, row in _row_blocks(chunk, hidden):
            a, b = values[: at.stop - at.start], others[: at.stop - at.start]
            exponents[at] += typical[chunk.layer]
            a[...] = exponents[at]
            a *= EXPONENT_UNIT  # faster than a shift
            b.view(np.int16)[...] = signed[at]
            b &= SIGN_AND_MANTISSA
            np.bitwise_or(a, b, out=bits[row][(slice(None), *chunk.layer)])
    return bits


def _typical_exponents(rows: StateRows) -> NDArray[np.uint8]:
    """Return [(L,) H] the commonest exponent of each channel among some rows."""
    channels = math.prod(rows.shape[1:])
    sample = rows.every(max(1, rows.shape[0] // CALIBRATION_ROWS)).reshape(-1, channels)
    exponents = (sample >> 7) & 0xFF
    cells = exponents + (np.arange(channels, dtype=np.int64) << 8)
    counts = np.bincount(cells.ravel(), minlength=channels << 8).reshape(channels, 256)
    typical: NDArray[np.uint8] = counts.argmax(axis=1).astype(np.uint8)
    return typical.reshape(rows.shape[1:])


# ---- int8, int6, int4


def _write_codes(name: str, rows: StateRows, open_object: OpenObject, *, largest: int) -> None:
    mean, scale = _channel_statistics(rows)
    _write_calibration(f"{name}_channel_mean", mean, open_object)
    _write_calibration(f"{name}_channel_scale", scale, open_object)
    reciprocal = 1 / scale
    hidden, groups = rows.shape[-1], _num_groups(rows.shape[-1])
    entropy_only, general = zstd.Frames(zstd.ENTROPY_ONLY), zstd.Frames()
    values = _grouped_values(hidden, groups)
    codes = _padded_chunk(rows.shape, np.int8)
    steps = np.empty((len(codes), groups), np.uint16)
    coded_steps: list[bytes] = []  # few: they are written when the codes are
    with write_array(_layout(f"{name}_codes", rows.shape, np.int8), open_object) as writer:
        for chunk in _chunks(rows.shape):
            codes[chunk.stop - chunk.first :] = 0
            steps[chunk.stop - chunk.first :] = 0
            for at, bits in rows.blocks(chunk.first, chunk.stop, chunk.layer):
                x = values[: len(bits)]
                np.subtract(bf16_to_float(bits), mean[chunk.layer], out=x[:, :hidden])
                x[:, :hidden] *= reciprocal[chunk.layer]
                grouped = x.reshape(len(bits), groups, GROUP_CHANNELS)
                farthest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2))
                steps[at] = _float_to_bf16_up(farthest / np.float32(largest))
                wide = bf16_to_float(steps[at])
                grouped *= (1 / np.where(wide == 0, 1, wide))[..., np.newaxis]
                np.rint(x, out=x)
                codes[at] = x[:, :hidden]
            writer.append(entropy_only.compress(codes))
            coded_steps.append(general.compress(steps))
    layout = _layout(f"{name}_steps", (*rows.shape[:-1], groups), np.uint16, hidden=hidden)
    with write_array(layout, open_object) as writer:
        for coded in coded_steps:
            writer.append(coded)


def _decode_codes(name: str, arrays: Mapping[str, LoadedArray], allocate: Allocate) -> Bits:
    coded_codes, coded_steps = arrays[f"{name}_codes"], arrays[f"{name}_steps"]
    mean = arrays[f"{name}_channel_mean"].whole().astype(np.float32)
    scale = arrays[f"{name}_channel_scale"].whole().astype(np.float32)
    bits = _empty_by_layer(coded_codes.layout.shape, allocate)
    hidden, groups = bits.shape[-1], _num_groups(bits.shape[-1])
    code_plane, step_plane = coded_codes.scratch(), coded_steps.scratch()
    values = _grouped_values(hidden, groups)
    for chunk in _chunks_of(coded_codes, coded_steps):
        codes = coded_codes.chunk(chunk.position, code_plane).reshape(-1, hidden)
        steps = coded_steps.chunk(chunk.position, step_plane).reshape(-1, groups)
        for at, row in _row_blocks(chunk, hidden):
            x = values[: at.stop - at.start]
            x[:, :hidden] = codes[at]
            x.reshape(len(x), groups, GROUP_CHANNELS)[...] *= bf16_to_float(steps[at])[..., None]
            real = x[:, :hidden]
            real *= scale[chunk.layer]
            real += mean[chunk.layer]
            bits[row][(slice(None), *chunk.layer)] = float_to_bf16(real)
    return bits


def _channel_statistics(rows: StateRows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return [(L,) H] mean, and root mean square around it to a power and never zero."""
    step = max(1, rows.shape[0] // CALIBRATION_ROWS)
    sample = bf16_to_float(rows.every(step)).astype(np.float64)
    if not len(sample):
        return np.zeros(rows.shape[1:], np.float32), np.ones(rows.shape[1:], np.float32)
    mean = sample.mean(axis=0).astype(np.float32)
    deviation = np.sqrt(np.square(sample - mean).mean(axis=0))
    return mean, np.maximum(deviation**SCALE_POWER, 1e-6).astype(np.float32)


def _num_groups(hidden: int) -> int:
    return -(-hidden // GROUP_CHANNELS)


# ---- bfloat16


def bf16_to_float(bits: Bits) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits: exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float_to_bf16(values: NDArray[np.float32]) -> Bits:
    """Return the bits of the nearest bfloat16 of finite values, ties to even."""
    wide = np.ascontiguousarray(values).view(np.uint32)
    odd = wide >> 16
    odd &= 1
    odd += wide
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)


def _float_to_bf16_up(values: NDArray[np.float32]) -> Bits:
    """Return the bits of the smallest bfloat16 not below non-negative values."""
    wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((wide + 0xFFFF) >> 16).astype(np.uint16)


# ---- layout


def _chunk_rows(num_rows: int, hidden: int) -> int:
    """Return rows of an inner chunk: equal portions, so that the last is hardly padded."""
    most = max(1, CHUNK_VALUES // hidden)
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


def _layout(
    name: str,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    *,
    compressed: bool = True,
    hidden: int | None = None,
) -> ArrayLayout:
    """Return a layout with one layer in each inner chunk: layers have their own statistics."""
    rows = _chunk_rows(shape[0], hidden or shape[-1])
    last = "hidden" if hidden is None else "group"
    return ArrayLayout(
        name=name,
        shape=shape,
        dtype=np.dtype(dtype),
        dimension_names=("token", last) if len(shape) == 2 else ("token", "layer", last),
        inner_chunk=(rows, *(1 for _ in shape[1:-1]), shape[-1]),
        compressed=compressed,
    )


def _chunks(shape: tuple[int, ...], rows: int | None = None) -> Iterator[_Chunk]:
    """Yield the inner chunks of states of this shape in C order."""
    rows = rows or _chunk_rows(shape[0], shape[-1])
    for number, first in enumerate(range(0, shape[0], rows)):
        for layer in np.ndindex(shape[1:-1]):
            yield _Chunk(
                position=(number, *layer, 0),
                layer=layer,
                first=first,
                stop=min(first + rows, shape[0]),
            )


def _chunks_of(*planes: LoadedArray) -> Iterator[_Chunk]:
    """Yield the inner chunks that all planes have; ValueError if they do not fit each other."""
    layouts = [plane.layout for plane in planes]
    shape, inner = layouts[0].shape, layouts[0].inner_chunk
    whole = (inner[0], *(1 for _ in shape[1:-1]), shape[-1])
    fits = all((a.shape[:-1], a.inner_chunk[:-1]) == (shape[:-1], inner[:-1]) for a in layouts)
    if not fits or inner != whole:
        raise ValueError(f"its planes do not fit each other: {layouts}")
    return _chunks(shape, inner[0])


def _row_blocks(chunk: _Chunk, hidden: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows of a chunk that fit the cache, and which rows of the array they are."""
    block_rows = max(1, BLOCK_VALUES // hidden)
    for first in range(chunk.first, chunk.stop, block_rows):
        stop = min(first + block_rows, chunk.stop)
        yield slice(first - chunk.first, stop - chunk.first), slice(first, stop)


def _padded_chunk(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Return memory for an inner chunk; the last one has fewer rows than that."""
    return np.empty((_chunk_rows(shape[0], shape[-1]), shape[-1]), dtype)


def _empty_by_layer(shape: tuple[int, ...], allocate: Allocate) -> Bits:
    """Return memory [R, (L,) H] whose layers lie side by side, as chunks fill them."""
    return np.moveaxis(allocate((*shape[1:-1], shape[0], shape[-1]), np.uint16), -2, 0)


def _grouped_values(hidden: int, groups: int) -> NDArray[np.float32]:
    """Return room for the rows of a block, [r, 64 * groups], with zeros behind the channels."""
    values = np.empty((max(1, BLOCK_VALUES // hidden), groups * GROUP_CHANNELS), np.float32)
    values[:, hidden:] = 0
    return values


def _temporaries(hidden: int, dtype: type[np.generic], count: int) -> list[NDArray[Any]]:
    return [np.empty((max(1, BLOCK_VALUES // hidden), hidden), dtype) for _ in range(count)]


def _write_calibration(name: str, values: NDArray[np.generic], open_object: OpenObject) -> None:
    write_small(name, values, ("layer", "hidden")[-values.ndim :], open_object)
