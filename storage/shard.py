"""A shard: whole samples, ragged, as the objects of one Zarr v3 group.

Equal samples in equal order give equal bytes. Layout (see `docs/store-format.md`): `offsets` [N+1],
then per-token arrays of all samples one after the other, without padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.arrays import StoredArray, decode_arrays, encode_array, row_chunk
from storage.canonical import canonical_json
from storage.errors import ShardCorruptError
from storage.identity import FORMAT_VERSION, StoreIdentity
from storage.samples import StoredSample, content_id

GROUP_KEY = "zarr.json"
TOKEN_ARRAYS: Mapping[str, str] = {
    "input_ids": "int32",
    "loss_mask": "bool",
    "target_argmax": "int32",
    "target_logsumexp": "float32",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedShard:
    """The arrays of a shard in memory; N samples, T tokens of all of them."""

    shard_id: str
    sample_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    """[N + 1]"""
    arrays: Mapping[str, NDArray[np.generic]]
    """[T, ...] by the name of the sample's field."""

    @property
    def num_bytes(self) -> int:
        """Return the memory the arrays take."""
        return sum(array.nbytes for array in self.arrays.values())

    def sample(self, position: int) -> StoredSample:
        """Return a copy of the sample at `position`; raise unless its content has its id."""
        rows = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
        sample = StoredSample(
            sample_id=self.sample_ids[position],
            **{name: array[rows].copy() for name, array in self.arrays.items()},  # type: ignore[arg-type]
        )
        found = content_id(sample.input_ids, sample.loss_mask)
        if found != sample.sample_id:
            raise ShardCorruptError(
                f"shard {self.shard_id}: sample {position} has content id {found}, expected "
                f"{sample.sample_id}; regenerate the shard: eyas repair"
            )
        return sample


def raw_bytes(samples: Sequence[StoredSample]) -> int:
    """Return the size of the arrays as handed in."""
    names = (*TOKEN_ARRAYS, "aux_hidden_states", "last_hidden_state")
    return sum(getattr(sample, name).nbytes for sample in samples for name in names)


def encode_shard(
    shard_id: str, samples: Sequence[StoredSample], identity: StoreIdentity
) -> Iterator[tuple[str, memoryview]]:
    """Yield every object of the shard with its key, one array in memory at a time."""
    yield GROUP_KEY, memoryview(_group_json(shard_id, samples, identity))
    for array in _arrays(samples):
        yield from encode_array(array).items()


def decode_shard(
    shard_id: str, objects: Mapping[str, bytes], *, sample_ids: Sequence[str]
) -> DecodedShard:
    """Decode objects whose digests were checked; raise ShardCorruptError if they do not fit."""
    arrays = dict(decode_arrays(objects, what=f"shard {shard_id}"))
    try:
        offsets = arrays.pop("offsets").astype(np.int64)
    except KeyError as error:
        raise ShardCorruptError(
            f"shard {shard_id} has no offsets; regenerate the shard: eyas repair"
        ) from error
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(offsets) != len(sample_ids) + 1 or set(lengths.values()) != {int(offsets[-1])}:
        raise ShardCorruptError(
            f"shard {shard_id}: {len(sample_ids)} samples and offsets up to {offsets[-1]} do not "
            f"fit arrays of {lengths}; regenerate the shard: eyas repair"
        )
    return DecodedShard(
        shard_id=shard_id, sample_ids=tuple(sample_ids), offsets=offsets, arrays=arrays
    )


def _arrays(samples: Sequence[StoredSample]) -> Iterator[StoredArray]:
    lengths = np.array([0, *(len(sample) for sample in samples)], dtype=np.int64)
    yield _small("offsets", np.cumsum(lengths), "sample_boundary")
    for name in TOKEN_ARRAYS:
        yield _small(name, _joined(samples, name), "token")
    yield _states("aux_hidden_states", samples, ("token", "layer", "hidden"))
    yield _states("last_hidden_state", samples, ("token", "hidden"))


def _joined(samples: Sequence[StoredSample], name: str) -> NDArray[np.generic]:
    return np.concatenate([getattr(sample, name) for sample in samples])


def _small(name: str, values: NDArray[np.generic], dimension: str) -> StoredArray:
    return StoredArray(
        name=name, values=values, dimension_names=(dimension,), inner_chunk=row_chunk(values)
    )


def _states(name: str, samples: Sequence[StoredSample], dims: tuple[str, ...]) -> StoredArray:
    values = _joined(samples, name)
    return StoredArray(
        name=name,
        values=values,
        dimension_names=dims,
        inner_chunk=row_chunk(values),
        compressors=(),
    )


def _group_json(shard_id: str, samples: Sequence[StoredSample], identity: StoreIdentity) -> bytes:
    about = {
        "format_version": FORMAT_VERSION,
        "profile": identity.profile,
        "identity_id": identity.identity_id,
        "shard_id": shard_id,
        "sample_ids": [sample.sample_id for sample in samples],
    }
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {"eyas": about}})
