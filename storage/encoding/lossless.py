"""The `lossless` profile: exponents separate from signs and mantissas, both compressed.

One byte holds the exponent; the other holds sign and mantissa, like a signed 8-bit integer, so that
widening it moves the sign to its place. The channel's typical exponent is subtracted from the
exponents modulo 256, which leaves about 2.7 of 8 bits of entropy. A chunk is split and compressed
while it is in the CPU cache.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from storage.encoding import zstd
from storage.encoding.state_chunks import (
    chunks,
    chunks_of,
    empty_by_layer,
    padded_chunk,
    row_blocks,
    states_layout,
    temporaries,
    write_calibration,
)
from storage.encoding.state_rows import Bits, StateRows
from storage.encoding.zarr_arrays import LoadedArray, OpenObject, write_array
from storage.objects.buffer_pool import Allocate

CALIBRATION_ROWS = 256
EXPONENT_UNIT = np.uint16(1 << 7)
SIGN_AND_MANTISSA = np.uint16(0x807F)


def write(name: str, rows: StateRows, open_object: OpenObject) -> None:
    """Write the arrays that hold `rows`.

    Each array is written from all rows before the next one: both at a time would need two files.
    """
    typical = _typical_exponents(rows)
    write_calibration(f"{name}_typical_exponents", typical, open_object)

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
    """Write one byte of each value: `split` fills a plane from bits, which it may overwrite."""
    (values,) = temporaries(rows.shape[-1], np.uint16, 1)
    plane = padded_chunk(rows.shape, np.uint8)
    frames = zstd.Frames(parameters)
    with write_array(states_layout(name, rows.shape, np.uint8), open_object) as writer:
        for chunk in chunks(rows.shape):
            plane[chunk.stop - chunk.first :] = 0
            for at, bits in rows.blocks(chunk.first, chunk.stop, chunk.layer):
                block = values[: len(bits)]
                block[...] = bits  # the rest is faster on contiguous rows
                split(block, plane[at], chunk.layer)
            writer.append(frames.compress(plane))


def decode(name: str, arrays: Mapping[str, LoadedArray], allocate: Allocate) -> Bits:
    """Return the bits [R, (L,) H]; see `storage.encoding.states.decode_states` for errors."""
    coded_exponents, coded_mantissas = arrays[f"{name}_exponents"], arrays[f"{name}_mantissas"]
    typical = arrays[f"{name}_typical_exponents"].whole().astype(np.uint8)
    bits = empty_by_layer(coded_exponents.layout.shape, allocate)
    hidden = bits.shape[-1]
    exponent_plane, mantissa_plane = coded_exponents.scratch(), coded_mantissas.scratch()
    values, others = temporaries(hidden, np.uint16, 2)
    for chunk in chunks_of(coded_exponents, coded_mantissas):
        exponents = coded_exponents.chunk(chunk.position, exponent_plane).reshape(-1, hidden)
        mantissas = coded_mantissas.chunk(chunk.position, mantissa_plane).reshape(-1, hidden)
        signed = mantissas.view(np.int8)
        for at, row in row_blocks(chunk, hidden):
            a, b = values[: at.stop - at.start], others[: at.stop - at.start]
            exponents[at] += typical[chunk.layer]
            a[...] = exponents[at]
            a *= EXPONENT_UNIT  # faster than a shift
            b.view(np.int16)[...] = signed[at]
            b &= SIGN_AND_MANTISSA
            np.bitwise_or(a, b, out=bits[row][(slice(None), *chunk.layer)])
    return bits


def _typical_exponents(rows: StateRows) -> NDArray[np.uint8]:
    """Return [(L,) H] the most common exponent of each channel in a sample of rows."""
    channels = math.prod(rows.shape[1:])
    sample = rows.every(max(1, rows.shape[0] // CALIBRATION_ROWS)).reshape(-1, channels)
    exponents = (sample >> 7) & 0xFF
    cells = exponents + (np.arange(channels, dtype=np.int64) << 8)
    counts = np.bincount(cells.ravel(), minlength=channels << 8).reshape(channels, 256)
    typical: NDArray[np.uint8] = counts.argmax(axis=1).astype(np.uint8)
    return typical.reshape(rows.shape[1:])
