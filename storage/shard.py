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
from storage.profile import decode_states, encode_states
from storage.samples import StoredSample, content_id, last_needed

GROUP_KEY = "zarr.json"
TOKEN_ARRAYS: Mapping[str, type[np.generic]] = {
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "last_present": np.bool_,
    "target_argmax": np.int32,
    "target_logsumexp": np.float32,
}
STATES = ("aux_hidden_states", "last_hidden_state")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedShard:
    """The arrays of a shard in memory; N samples, T tokens of all of them."""

    shard_id: str
    sample_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    """[N + 1]"""
    arrays: Mapping[str, NDArray[np.generic]]
    """[T, ...] by the name of the sample's field; `last_hidden_state` has present rows only."""
    last_offsets: NDArray[np.int64]
    """[T + 1] rows of `last_hidden_state` before each token."""

    @property
    def num_bytes(self) -> int:
        """Return the memory the arrays take."""
        return sum(array.nbytes for array in self.arrays.values())

    def sample(self, position: int) -> StoredSample:
        """Return a copy of the sample at `position`; raise unless its content has its id."""
        rows = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
        fields = {name: self.arrays[name][rows].copy() for name in TOKEN_ARRAYS}
        fields["aux_hidden_states"] = self.arrays["aux_hidden_states"][rows].copy()
        fields["last_hidden_state"] = self._last(rows, fields["last_present"])
        sample = StoredSample(sample_id=self.sample_ids[position], **fields)  # type: ignore[arg-type]
        found = content_id(sample.input_ids, sample.loss_mask)
        if found != sample.sample_id:
            raise ShardCorruptError(
                f"shard {self.shard_id}: sample {position} has content id {found}, expected "
                f"{sample.sample_id}; regenerate the shard: eyas repair"
            )
        return sample

    def _last(self, rows: slice, present: NDArray[np.generic]) -> NDArray[np.generic]:
        stored = self.arrays["last_hidden_state"]
        kept = stored[self.last_offsets[rows.start] : self.last_offsets[rows.stop]]
        last = np.zeros((len(present), *stored.shape[1:]), stored.dtype)
        last[present.astype(np.bool_)] = kept
        return last


def raw_bytes(samples: Sequence[StoredSample]) -> int:
    """Return the size of the arrays as handed in."""
    names = (*(name for name in TOKEN_ARRAYS if name != "last_present"), *STATES)
    return sum(getattr(sample, name).nbytes for sample in samples for name in names)


def encode_shard(
    shard_id: str, samples: Sequence[StoredSample], identity: StoreIdentity
) -> Iterator[tuple[str, memoryview]]:
    """Yield every object of the shard with its key, one array in memory at a time."""
    yield GROUP_KEY, memoryview(_group_json(shard_id, samples, identity))
    for array in _arrays(samples, identity):
        yield from encode_array(array).items()


def decode_shard(
    shard_id: str, objects: Mapping[str, bytes], *, sample_ids: Sequence[str], profile: str
) -> DecodedShard:
    """Decode objects whose digests were checked; raise ShardCorruptError if they do not fit."""
    stored = decode_arrays(objects, what=f"shard {shard_id}")
    try:
        offsets = stored["offsets"].astype(np.int64)
        arrays = {name: stored[name].astype(kind) for name, kind in TOKEN_ARRAYS.items()}
        for name in STATES:
            arrays[name] = decode_states(profile, name, stored)
    except KeyError as error:
        raise ShardCorruptError(
            f"shard {shard_id} has no array {error}; regenerate the shard: eyas repair"
        ) from error
    last_offsets = np.cumsum([0, *arrays["last_present"].astype(np.int64)])
    lengths = {name: len(array) for name, array in arrays.items()}
    last_rows = lengths.pop("last_hidden_state")
    fits = len(offsets) == len(sample_ids) + 1 and set(lengths.values()) == {int(offsets[-1])}
    if not fits or last_rows != last_offsets[-1]:
        raise ShardCorruptError(
            f"shard {shard_id}: {len(sample_ids)} samples and offsets up to {offsets[-1]} do not "
            f"fit arrays of {lengths} and {last_rows} "
            "last hidden states; regenerate the shard: eyas repair"
        )
    return DecodedShard(
        shard_id=shard_id,
        sample_ids=tuple(sample_ids),
        offsets=offsets,
        arrays=arrays,
        last_offsets=last_offsets,
    )


def _arrays(samples: Sequence[StoredSample], identity: StoreIdentity) -> Iterator[StoredArray]:
    lengths = np.array([0, *(len(sample) for sample in samples)], dtype=np.int64)
    needed = np.concatenate([last_needed(sample.loss_mask) for sample in samples])
    token_type = np.min_scalar_type(identity.vocab_size - 1)  # unsigned, no wider than needed
    yield _small("offsets", np.cumsum(lengths), "sample_boundary")
    yield _small("input_ids", _joined(samples, "input_ids").astype(token_type))
    yield _small("loss_mask", _joined(samples, "loss_mask"))
    yield _small("last_present", needed)
    yield _small("target_argmax", _joined(samples, "target_argmax").astype(token_type))
    yield _small("target_logsumexp", _joined(samples, "target_logsumexp"))
    aux = _joined(samples, "aux_hidden_states").view(np.uint16)
    yield from encode_states(identity.profile, "aux_hidden_states", aux)
    del aux
    last = _joined(samples, "last_hidden_state").view(np.uint16)[needed]
    yield from encode_states(identity.profile, "last_hidden_state", last)


def _joined(samples: Sequence[StoredSample], name: str) -> NDArray[np.generic]:
    return np.concatenate([getattr(sample, name) for sample in samples])


def _small(name: str, values: NDArray[np.generic], dimension: str = "token") -> StoredArray:
    return StoredArray(
        name=name, values=values, dimension_names=(dimension,), inner_chunk=row_chunk(values)
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
