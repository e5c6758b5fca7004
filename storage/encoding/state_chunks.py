"""The inner chunks of arrays that hold states: rows of one layer each.

Shapes: R rows, L layers (absent for the last hidden state), H hidden size. Each layer has different
statistics, so layers never share a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.bfloat16 import BLOCK_VALUES
from storage.encoding.state_rows import Bits
from storage.encoding.zarr_arrays import ArrayLayout, LoadedArray, OpenObject, write_small
from storage.objects.buffer_pool import Allocate

CHUNK_VALUES = 1 << 22
"""Large enough that whole samples, which may have a common prefix, share a chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One inner chunk of all arrays that encode some states: some rows of one layer."""

    position: tuple[int, ...]
    """Position in the grid."""
    layer: tuple[Any, ...]
    first: int
    stop: int


def _chunk_rows(num_rows: int, hidden: int) -> int:
    """Return the rows per inner chunk: equal portions, so that the last has little padding."""
    most = max(1, CHUNK_VALUES // hidden)
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


def states_layout(
    name: str,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    *,
    compressed: bool = True,
    hidden: int | None = None,
) -> ArrayLayout:
    """Return a layout with one layer per inner chunk: layers differ in their statistics."""
    rows = _chunk_rows(shape[0], hidden or shape[-1])
    last_axis = "hidden" if hidden is None else "group"
    return ArrayLayout(
        name=name,
        shape=shape,
        dtype=np.dtype(dtype),
        dimension_names=("token", last_axis) if len(shape) == 2 else ("token", "layer", last_axis),
        inner_chunk=(rows, *(1 for _ in shape[1:-1]), shape[-1]),
        compressed=compressed,
    )


def chunks(shape: tuple[int, ...], rows: int | None = None) -> Iterator[Chunk]:
    """Yield the inner chunks of states of this shape in C order."""
    rows = rows or _chunk_rows(shape[0], shape[-1])
    for number, first in enumerate(range(0, shape[0], rows)):
        for layer in np.ndindex(shape[1:-1]):
            yield Chunk(
                position=(number, *layer, 0),
                layer=layer,
                first=first,
                stop=min(first + rows, shape[0]),
            )


def chunks_of(*planes: LoadedArray) -> Iterator[Chunk]:
    """Yield the inner chunks that all planes have; ValueError if their layouts do not match."""
    layouts = [plane.layout for plane in planes]
    shape, inner = layouts[0].shape, layouts[0].inner_chunk
    whole = (inner[0], *(1 for _ in shape[1:-1]), shape[-1])
    fits = all((a.shape[:-1], a.inner_chunk[:-1]) == (shape[:-1], inner[:-1]) for a in layouts)
    if not fits or inner != whole:
        raise ValueError(f"the layouts of its planes do not match: {layouts}")
    return chunks(shape, inner[0])


def row_blocks(chunk: Chunk, hidden: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of rows that fit the CPU cache: their slices of the chunk and of the array."""
    block_rows = max(1, BLOCK_VALUES // hidden)
    for first in range(chunk.first, chunk.stop, block_rows):
        stop = min(first + block_rows, chunk.stop)
        yield slice(first - chunk.first, stop - chunk.first), slice(first, stop)


def padded_chunk(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Return memory for an inner chunk; the last chunk has fewer rows than that."""
    return np.empty((_chunk_rows(shape[0], shape[-1]), shape[-1]), dtype)


def empty_by_layer(shape: tuple[int, ...], allocate: Allocate) -> Bits:
    """Return memory [R, (L,) H] in which each layer is contiguous, as chunks fill it."""
    return np.moveaxis(allocate((*shape[1:-1], shape[0], shape[-1]), np.uint16), -2, 0)


def temporaries(hidden: int, dtype: type[np.generic], count: int) -> list[NDArray[Any]]:
    return [np.empty((max(1, BLOCK_VALUES // hidden), hidden), dtype) for _ in range(count)]


def write_calibration(name: str, values: NDArray[np.generic], open_object: OpenObject) -> None:
    write_small(name, values, ("layer", "hidden")[-values.ndim :], open_object)
