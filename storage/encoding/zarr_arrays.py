"""One NumPy array as the objects of one Zarr v3 array, and back.

An array is one shard object whose inner chunks end in crc32c, so that any reader notices a flipped
bit. Every inner chunk is written, even an all-zero one: absence never means zero here. Zarr itself
generates the metadata. This module packs and unpacks chunks, because Zarr's pipeline copies each of
them several times (docs/adr/0007-own-shard-codec.md).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore

from storage.encoding import zstd
from storage.errors import ShardCorruptError
from storage.objects.sealed_json import canonical_json

INNER_CHUNK_BYTES = 1 << 20
CRC_BYTES = 4
METADATA_KEY = "zarr.json"
COMPRESSED = [BytesCodec, ZstdCodec, Crc32cCodec]
PLAIN = [BytesCodec, Crc32cCodec]
_INDEX_ENTRY = np.dtype([("offset", "<u8"), ("num_bytes", "<u8")])


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayLayout:
    """The metadata of an array: everything but its values."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    dimension_names: tuple[str, ...]
    inner_chunk: tuple[int, ...]
    compressed: bool = True
    """Whether inner chunks are Zstandard frames, or plain little-endian bytes."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the number of inner chunks along each axis; the last ones may be padded."""
        return tuple(-(-n // step) for n, step in zip(self.shape, self.inner_chunk, strict=True))

    @property
    def metadata_key(self) -> str:
        """Return the key of the metadata, relative to the group."""
        return f"{self.name}/{METADATA_KEY}"

    @property
    def shard_key(self) -> str:
        """Return the key of the one shard object, relative to the group."""
        return f"{self.name}/{'.'.join(['c', *('0' for _ in self.shape)])}"


Write = Callable[[bytes], object]
OpenObject = Callable[[str], AbstractContextManager[Write]]
"""Opens an object, by its key in the group, for writing piece by piece."""


class ArrayWriter:
    """The shard object of an array, written chunk by chunk."""

    def __init__(self, write: Write) -> None:
        """Append to an object with `write`."""
        self._write = write
        self._ends = [0]

    def append(self, chunk: bytes) -> None:
        """Write the next encoded inner chunk, in C order of the grid, and its crc32c."""
        self._write(chunk)
        self._write(_crc32c(chunk))
        self._ends.append(self._ends[-1] + len(chunk) + CRC_BYTES)

    def finish(self) -> None:
        """Write the index: the offset and size of each chunk."""
        index = np.empty(len(self._ends) - 1, _INDEX_ENTRY)
        index["offset"] = self._ends[:-1]
        index["num_bytes"] = np.diff(self._ends)
        entries = index.tobytes()
        self._write(entries)
        self._write(_crc32c(entries))


@contextmanager
def write_array(layout: ArrayLayout, open_object: OpenObject) -> Iterator[ArrayWriter]:
    """Write the objects of an array: the block appends every inner chunk of the layout's grid.

    An array without values has no shard object.
    """
    with open_object(layout.metadata_key) as write:
        write(_metadata(layout))
    if not math.prod(layout.grid):
        yield ArrayWriter(_write_nothing)
        return
    with open_object(layout.shard_key) as write:
        writer = ArrayWriter(write)
        yield writer
        writer.finish()


class LoadedArray:
    """The objects of one array, decoded chunk by chunk.

    The caller has checked their digests: crc32c is for readers that cannot do that.
    """

    def __init__(self, layout: ArrayLayout, shard: bytes | memoryview) -> None:
        """Parse the index of the shard; ValueError if the shard is too short for it."""
        self.layout = layout
        self._shard = memoryview(shard)
        num_chunks = math.prod(layout.grid)
        index_bytes = num_chunks * _INDEX_ENTRY.itemsize + CRC_BYTES if num_chunks else 0
        if len(shard) < index_bytes:
            raise ValueError(f"its shard has {len(shard)} bytes, the index alone {index_bytes}")
        index = self._shard[len(shard) - index_bytes :][: num_chunks * _INDEX_ENTRY.itemsize]
        self._index = np.frombuffer(index, _INDEX_ENTRY).reshape(layout.grid)

    def chunk(self, position: tuple[int, ...], scratch: NDArray[Any]) -> NDArray[Any]:
        """Return a whole inner chunk: `scratch`, or a view of the shard if it is uncompressed.

        Args:
            position: of the chunk in the grid.
            scratch: [inner_chunk] contiguous, of the array's dtype; may be overwritten.

        """
        entry = self._index[position]
        first, num_bytes = int(entry["offset"]), int(entry["num_bytes"]) - CRC_BYTES
        encoded = self._shard[first : first + num_bytes]
        if self.layout.compressed:
            zstd.decompress(encoded, scratch)
            return scratch
        return np.frombuffer(encoded, self.layout.dtype).reshape(self.layout.inner_chunk)

    def scratch(self) -> NDArray[Any]:
        """Return memory for one inner chunk."""
        return np.empty(self.layout.inner_chunk, self.layout.dtype)

    def whole(self) -> NDArray[np.generic]:
        """Return all values."""
        values = np.empty(self.layout.shape, self.layout.dtype)
        scratch = self.scratch()
        for position in np.ndindex(self.layout.grid):
            region = self._region(position)
            inside = tuple(slice(0, rows.stop - rows.start) for rows in region)
            values[region] = self.chunk(position, scratch)[inside]
        return values

    def _region(self, position: tuple[int, ...]) -> tuple[slice, ...]:
        layout = self.layout
        return tuple(
            slice(at * step, min((at + 1) * step, size))
            for at, step, size in zip(position, layout.inner_chunk, layout.shape, strict=True)
        )


def write_small(
    name: str,
    values: NDArray[np.generic],
    dimension_names: tuple[str, ...],
    open_object: OpenObject,
) -> None:
    """Write a small array, in inner chunks of whole rows, of at most 1 MiB each if possible."""
    row_bytes = max(1, values.nbytes // max(1, len(values)))
    rows = max(1, min(INNER_CHUNK_BYTES // row_bytes, len(values)))
    layout = ArrayLayout(
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        dimension_names=dimension_names,
        inner_chunk=(rows, *values.shape[1:]),
    )
    frames = zstd.Frames()
    chunk = np.empty(layout.inner_chunk, values.dtype)
    with write_array(layout, open_object) as writer:
        for first in range(0, len(values), rows):
            members = values[first : first + rows]
            chunk[: len(members)] = members
            chunk[len(members) :] = 0
            writer.append(frames.compress(chunk))


def load_arrays(
    objects: Mapping[str, bytes | memoryview], *, what: str
) -> Mapping[str, LoadedArray]:
    """Return every array of a group by name; raise ShardCorruptError naming one we cannot decode.

    The caller has checked the presence, sizes and digests of the objects: Zarr itself would read an
    absent object as zeros.
    """
    arrays: dict[str, LoadedArray] = {}
    for key in sorted(objects):
        name, _, rest = key.partition("/")
        if rest == METADATA_KEY:
            problem = f"{what}: array {name} does not decode"
            try:
                layout = _parse_layout(name, objects[key])
                arrays[name] = LoadedArray(layout, objects.get(layout.shard_key, b""))
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                raise ShardCorruptError(
                    f"{problem}: {error}; regenerate the shard: eyas repair"
                ) from error
    return arrays


def _metadata(layout: ArrayLayout) -> bytes:
    document = json.loads(_metadata_like(layout.dtype, len(layout.shape), layout.compressed))
    covering = [
        max(1, count) * step for count, step in zip(layout.grid, layout.inner_chunk, strict=True)
    ]
    document["shape"] = layout.shape
    document["chunk_grid"]["configuration"]["chunk_shape"] = covering
    document["codecs"][0]["configuration"]["chunk_shape"] = layout.inner_chunk
    document["dimension_names"] = layout.dimension_names
    return canonical_json(document)


@lru_cache
def _metadata_like(dtype: np.dtype[np.generic], num_axes: int, compressed: bool) -> str:
    """Return Zarr's metadata of an array of this kind; cached, because Zarr is slow."""
    objects: dict[str, zarr.core.buffer.Buffer] = {}
    zarr.create_array(
        store=MemoryStore(objects),
        shape=(1,) * num_axes,
        dtype=dtype,
        chunks=(1,) * num_axes,
        shards=(1,) * num_axes,
        compressors=(ZstdCodec(level=1), Crc32cCodec()) if compressed else (Crc32cCodec(),),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},  # no folders to make durable
        dimension_names=("",) * num_axes,
    )
    return objects[METADATA_KEY].to_bytes().decode()


def _parse_layout(name: str, metadata: bytes | memoryview) -> ArrayLayout:
    parsed = ArrayV3Metadata.from_dict(json.loads(bytes(metadata)))
    (sharding,) = parsed.codecs
    codecs = [type(codec) for codec in getattr(sharding, "codecs", ())]
    if not isinstance(sharding, ShardingCodec) or codecs not in (COMPRESSED, PLAIN):
        raise ValueError(
            f"its codecs are {parsed.codecs}, expected zstd and crc32c, or crc32c alone, in shards"
        )
    return ArrayLayout(
        name=name,
        shape=parsed.shape,
        dtype=parsed.data_type.to_native_dtype(),
        dimension_names=(),
        inner_chunk=sharding.chunk_shape,
        compressed=codecs == COMPRESSED,
    )


def _write_nothing(data: bytes) -> None:
    raise ValueError(f"an array without values has no chunk to write, found {len(data)} bytes")


def _crc32c(data: bytes) -> bytes:
    value: int = google_crc32c.value(data)
    return value.to_bytes(CRC_BYTES, "little")
