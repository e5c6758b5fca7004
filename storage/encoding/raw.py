"""The `raw` profile: bfloat16 bits, uncompressed."""

from collections.abc import Mapping

import numpy as np

from storage.encoding.state_chunks import (
    chunks,
    chunks_of,
    empty_by_layer,
    padded_chunk,
    states_layout,
)
from storage.encoding.state_rows import Bits, StateRows
from storage.encoding.zarr_arrays import LoadedArray, OpenObject, write_array
from storage.objects.buffer_pool import Allocate


def write(name: str, rows: StateRows, open_object: OpenObject) -> None:
    """Write the arrays that hold `rows`."""
    bits = padded_chunk(rows.shape, np.uint16)
    layout = states_layout(name, rows.shape, np.uint16, compressed=False)
    with write_array(layout, open_object) as writer:
        for chunk in chunks(rows.shape):
            bits[chunk.stop - chunk.first :] = 0
            for at, block in rows.blocks(chunk.first, chunk.stop, chunk.layer):
                bits[at] = block
            writer.append(bits.tobytes())


def decode(name: str, arrays: Mapping[str, LoadedArray], allocate: Allocate) -> Bits:
    """Return the bits [R, (L,) H]; see `storage.encoding.states.decode_states` for errors."""
    coded = arrays[name]
    bits = empty_by_layer(coded.layout.shape, allocate)
    scratch = coded.scratch()
    for chunk in chunks_of(coded):
        values = coded.chunk(chunk.position, scratch).reshape(-1, bits.shape[-1])
        rows = bits[chunk.first : chunk.stop][(slice(None), *chunk.layer)]
        rows[...] = values[: len(rows)]
    return bits
