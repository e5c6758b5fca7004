"""One NumPy array as the objects of one Zarr v3 array, and back.

An array is one shard object whose inner chunks end in crc32c, so that any reader notices a flipped
bit. Every inner chunk is written, even an all-zero one: absence never means zero here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from storage.errors import ShardCorruptError

INNER_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredArray:
    """An array and how it is laid out."""

    name: str
    values: NDArray[np.generic]
    dimension_names: tuple[str, ...]
    inner_chunk: tuple[int, ...]
    compressors: tuple[BytesBytesCodec, ...] = field(default=(ZstdCodec(level=1),))
    """Applied to each inner chunk before its crc32c."""


def row_chunk(values: NDArray[np.generic]) -> tuple[int, ...]:
    """Return an inner chunk of whole rows, a power of two of them, of at most 1 MiB if possible."""
    row_bytes = max(1, values.nbytes // max(1, len(values)))
    rows = 1 << max(0, (INNER_CHUNK_BYTES // row_bytes).bit_length() - 1)
    needed = 1 << max(0, len(values) - 1).bit_length()
    return (min(rows, needed), *values.shape[1:])


def encode_array(array: StoredArray) -> Mapping[str, memoryview]:
    """Return the objects of a Zarr v3 array, by key relative to its group."""
    stored: dict[str, Buffer] = {}
    node = zarr.create_array(
        store=MemoryStore(stored),
        name=array.name,
        shape=array.values.shape,
        dtype=array.values.dtype,
        chunks=array.inner_chunk,
        shards=_covering(array.values.shape, array.inner_chunk),
        compressors=(*array.compressors, Crc32cCodec()),
        fill_value=0,
        dimension_names=array.dimension_names,
        config={"write_empty_chunks": True},
    )
    node[...] = array.values
    return {
        key: _bytes_of(stored[key]) for key in sorted(stored) if key.startswith(f"{array.name}/")
    }


def decode_arrays(objects: Mapping[str, bytes], *, what: str) -> Mapping[str, NDArray[np.generic]]:
    """Return every array of a group; raise ShardCorruptError naming the one that does not decode.

    The objects' presence, sizes and digests have been checked by the caller: Zarr itself would read
    an absent object as zeros.
    """
    prototype = default_buffer_prototype()
    store = MemoryStore({key: prototype.buffer.from_bytes(data) for key, data in objects.items()})
    arrays: dict[str, NDArray[np.generic]] = {}
    for key in sorted(objects):
        name, _, rest = key.partition("/")
        if rest == "zarr.json":
            try:
                arrays[name] = np.asarray(zarr.open_array(store=store, path=name, mode="r")[...])
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                raise ShardCorruptError(
                    f"{what}: array {name} does not decode: {error}; regenerate the shard: "
                    "eyas repair"
                ) from error
    return arrays


def _bytes_of(stored: Buffer) -> memoryview:
    view: memoryview = stored.as_numpy_array().data
    return view


def _covering(shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-max(1, size) // step) * step for size, step in zip(shape, chunk, strict=True))
