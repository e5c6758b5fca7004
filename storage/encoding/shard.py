"""A shard: whole samples, ragged, as the objects of one Zarr v3 group.

Equal samples in equal order give equal bytes. Layout (see `docs/store-format.md`): `offsets` [N+1],
then the per-token arrays of all samples, concatenated without padding.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.encoding import zip_file
from storage.encoding.state_rows import StateRows
from storage.encoding.states import decode_states, write_states
from storage.encoding.zarr_arrays import OpenObject, load_arrays, write_small
from storage.errors import REPAIR, ShardCorruptError
from storage.objects.buffer_pool import Allocate
from storage.objects.sealed_json import canonical_json
from storage.records import keys
from storage.records.identity import FORMAT_VERSION, StoreIdentity
from storage.records.plan import shard_id as shard_id_of
from storage.samples import StoredSample, content_id, last_needed

GROUP_KEY = "zarr.json"
TOKEN_ARRAYS: Mapping[str, type[np.generic]] = {
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "last_present": np.bool_,
    "target_argmax": np.int32,
    "target_logsumexp": np.float32,
}
AUX_STATES, LAST_STATES = "aux_hidden_states", "last_hidden_state"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedShard:
    """The arrays of a shard in memory; N samples, T tokens in total."""

    shard_id: str
    sample_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    """[N + 1]"""
    arrays: Mapping[str, NDArray[np.generic]]
    """[T, ...] by the name of the sample's field; `last_hidden_state` has present rows only, or is
    absent if the store omits it."""
    last_offsets: NDArray[np.int64]
    """[T + 1] rows of `last_hidden_state` before each token."""

    @property
    def num_bytes(self) -> int:
        """Return the size of the arrays in memory."""
        return sum(array.nbytes for array in self.arrays.values())

    def sample(self, position: int) -> StoredSample:
        """Return the sample at `position`, as views; raise unless its content matches its id."""
        rows = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
        names = (*TOKEN_ARRAYS, AUX_STATES)
        fields = {name: self.arrays[name][rows] for name in names}
        fields[LAST_STATES] = self._last(rows, fields["last_present"])
        sample = StoredSample(sample_id=self.sample_ids[position], **fields)  # type: ignore[arg-type]
        found = content_id(sample.input_ids, sample.loss_mask)
        if found != sample.sample_id:
            raise ShardCorruptError(
                f"shard {self.shard_id}: sample {position} has content id {found}, expected "
                f"{sample.sample_id}; {REPAIR}"
            )
        return sample

    def _last(self, rows: slice, present: NDArray[np.generic]) -> NDArray[np.generic]:
        stored = self.arrays.get(LAST_STATES)
        if stored is None:
            aux = self.arrays[AUX_STATES]
            return np.empty((0, aux.shape[-1]), aux.dtype)
        kept = stored[self.last_offsets[rows.start] : self.last_offsets[rows.stop]]
        if len(kept) == len(present):
            return kept
        last = np.zeros((len(present), *stored.shape[1:]), stored.dtype)
        last[present.astype(np.bool_)] = kept
        return last


def raw_bytes(samples: Sequence[StoredSample]) -> int:
    """Return the size of the arrays before encoding."""
    names = (name for name in (*TOKEN_ARRAYS, AUX_STATES, LAST_STATES) if name != "last_present")
    return sum(getattr(sample, name).nbytes for name in names for sample in samples)


def write_arrays(
    shard_id: str,
    samples: Sequence[StoredSample],
    identity: StoreIdentity,
    open_object: OpenObject,
) -> None:
    """Write every object of the shard, with one chunk in memory at a time."""
    with open_object(GROUP_KEY) as write:
        write(_group_json(shard_id, samples, identity))
    lengths = np.array([0, *(len(sample) for sample in samples)], dtype=np.int64)
    write_small("offsets", np.cumsum(lengths), ("sample_boundary",), open_object)
    needed = [last_needed(sample.loss_mask) for sample in samples]
    for name, values in _token_arrays(samples, needed, identity).items():
        write_small(name, values, ("token",), open_object)
    first = len(identity.aux_layers) - len(identity.stored_aux_layers)
    aux = StateRows([sample.aux_hidden_states[:, first:] for sample in samples])
    write_states(AUX_STATES, aux, identity.profile, open_object)
    if identity.omitted is not None:
        return
    last = StateRows([part for pair in zip(samples, needed, strict=True) for part in _kept(*pair)])
    write_states(LAST_STATES, last, identity.profile, open_object)


def decode_shard(
    shard_id: str,
    objects: Mapping[str, bytes | memoryview],
    *,
    identity: StoreIdentity,
    allocate: Allocate = np.empty,
) -> DecodedShard:
    """Decode objects with checked digests; raise ShardCorruptError if they do not fit together.

    `objects` are those named by the record: the objects of the group, or one file with all of them.
    """
    group = group_objects(objects, shard_id=shard_id)
    stored = load_arrays(group, what=f"shard {shard_id}")
    sample_ids = _sample_ids(group, shard_id=shard_id)
    try:
        offsets = stored["offsets"].whole().astype(np.int64)
        arrays = {name: stored[name].whole().astype(kind) for name, kind in TOKEN_ARRAYS.items()}
        for name in (AUX_STATES,) if identity.omitted else (AUX_STATES, LAST_STATES):
            arrays[name] = decode_states(name, stored, identity.profile, allocate)
    except KeyError as error:
        raise ShardCorruptError(f"shard {shard_id} has no array {error}; {REPAIR}") from error
    except (ValueError, RuntimeError) as error:
        raise ShardCorruptError(f"shard {shard_id} does not decode: {error}; {REPAIR}") from error
    for array in arrays.values():
        array.setflags(write=False)  # samples are views: a write would change later fetches
    last_offsets = np.cumsum([0, *arrays["last_present"].astype(np.int64)])
    lengths = {name: len(array) for name, array in arrays.items()}
    last_rows = lengths.pop(LAST_STATES, int(last_offsets[-1]))
    fits = len(offsets) == len(sample_ids) + 1 and set(lengths.values()) == {int(offsets[-1])}
    num_layers = arrays[AUX_STATES].shape[1]
    if not fits or last_rows != last_offsets[-1] or num_layers != len(identity.stored_aux_layers):
        raise ShardCorruptError(
            f"shard {shard_id}: {len(sample_ids)} samples and offsets up to {offsets[-1]} do not "
            f"fit arrays of {lengths}, {num_layers} aux layers and {last_rows} "
            f"last hidden states; {REPAIR}"
        )
    return DecodedShard(
        shard_id=shard_id,
        sample_ids=tuple(sample_ids),
        offsets=offsets,
        arrays=arrays,
        last_offsets=last_offsets,
    )


def group_objects(
    objects: Mapping[str, bytes | memoryview], *, shard_id: str
) -> Mapping[str, bytes | memoryview]:
    """Return the objects of a shard's Zarr group from what its record names.

    Raises:
        ShardCorruptError: the record names one file, and it does not unpack.

    """
    key = next(iter(objects), "")
    if not key.endswith(keys.SHARD_SUFFIX):
        return objects
    try:
        return zip_file.unpacked(objects[key])
    except ValueError as error:
        raise ShardCorruptError(f"shard {shard_id} does not unpack: {error}; {REPAIR}") from error


def _sample_ids(group: Mapping[str, bytes | memoryview], *, shard_id: str) -> tuple[str, ...]:
    """Return the sample ids from the shard's own metadata."""
    what = f"shard {shard_id}: {GROUP_KEY}"
    try:
        document = json.loads(bytes(group[GROUP_KEY]))
        found = tuple(document["attributes"]["eyas"]["sample_ids"])
    except (ValueError, LookupError, TypeError) as error:
        raise ShardCorruptError(
            f"{what} does not list the samples of the shard: {error!r}; {REPAIR}"
        ) from error
    if shard_id_of(found) != shard_id:
        raise ShardCorruptError(f"{what} belongs to shard {shard_id_of(found)}; {REPAIR}")
    return found


def _token_arrays(
    samples: Sequence[StoredSample], needed: Sequence[NDArray[np.bool_]], identity: StoreIdentity
) -> Mapping[str, NDArray[np.generic]]:
    id_type = np.min_scalar_type(identity.vocab_size - 1)  # unsigned, no wider than needed
    return {
        "input_ids": _joined(samples, "input_ids").astype(id_type),
        "loss_mask": _joined(samples, "loss_mask"),
        "last_present": np.concatenate(needed),
        "target_argmax": _joined(samples, "target_argmax").astype(id_type),
        "target_logsumexp": _joined(samples, "target_logsumexp"),
    }


def _joined(samples: Sequence[StoredSample], name: str) -> NDArray[np.generic]:
    return np.concatenate([getattr(sample, name) for sample in samples])


def _kept(sample: StoredSample, needed: NDArray[np.bool_]) -> Iterator[NDArray[np.uint16]]:
    """Yield the runs of rows that are stored, as views; one empty run if there is none."""
    edges = np.flatnonzero(np.diff(needed, prepend=False, append=False)).tolist() or [0, 0]
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        yield sample.last_hidden_state[first:stop]


def _group_json(shard_id: str, samples: Sequence[StoredSample], identity: StoreIdentity) -> bytes:
    attributes = {
        "format_version": FORMAT_VERSION,
        "profile": identity.profile,
        "identity_id": identity.identity_id,
        "shard_id": shard_id,
        "sample_ids": [sample.sample_id for sample in samples],
    }
    return canonical_json(
        {"zarr_format": 3, "node_type": "group", "attributes": {"eyas": attributes}}
    )
