"""Findings: what is wrong with a store, where, and what to run about it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from storage.encoding.shard import decode_shard
from storage.errors import CorruptError
from storage.objects.object_store import Directory
from storage.objects.retry import retried
from storage.probe import disagreements
from storage.recompute import Recompute
from storage.records.commit_record import CommitRecord, ObjectDigest
from storage.records.identity import StoreIdentity
from storage.samples import StoredSample

REPAIR = "regenerate the shard: eyas repair"
PUBLISH = "publish the snapshot again: eyas repair"
MEND = "write it again from its copy: eyas repair"
REPLAN = "drop the plan, what it lacks is planned again: eyas repair"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as it was committed."""

    shard_id: str | None
    """The damaged shard, or None where the damage is not in one shard."""
    object_key: str
    """Key relative to the store's root."""
    problem: str
    """What was found and what was expected."""
    remedy: str

    def __str__(self) -> str:
        """Return one line for a report or an error."""
        return f"{self.object_key}: {self.problem}; {self.remedy}"


def check_sizes(root: Directory, record: CommitRecord) -> Iterator[Finding]:
    """Yield a finding for every object of the shard that is absent or has another size."""
    sizes = root.sizes(f"shards/{record.shard_id}")
    return _compare_sizes(record.shard_id, record.objects, sizes, prefix="")


def check_presence(
    root: Directory, committed: Mapping[str, Mapping[str, ObjectDigest]]
) -> Iterator[Finding]:
    """Yield what `check_sizes` would for the objects of many shards, after one listing of all."""
    sizes = root.sizes("shards")
    for shard_id, objects in committed.items():
        yield from _compare_sizes(shard_id, objects, sizes, prefix=f"{shard_id}/")


def _compare_sizes(
    shard_id: str, objects: Mapping[str, ObjectDigest], sizes: Mapping[str, int], *, prefix: str
) -> Iterator[Finding]:
    for key, expected in objects.items():
        found = sizes.get(prefix + key)
        if found is None:
            yield shard_finding(shard_id, key, f"is missing, committed {expected}")
        elif found != expected.num_bytes:
            yield shard_finding(shard_id, key, f"has {found} bytes, committed {expected}")


def check_digests(root: Directory, record: CommitRecord) -> Iterator[Finding]:
    """Yield a finding for every object of the shard whose bytes are not the committed ones."""
    for key, expected in record.objects.items():
        path = f"shards/{record.shard_id}/{key}"
        try:
            found = retried(partial(_digest, root, path, expected.num_bytes))
        except FileNotFoundError:
            found = None
        yield from _compare(record, key, found)


def _digest(root: Directory, path: str, num_bytes: int) -> ObjectDigest:
    return ObjectDigest.of_pieces(root.pieces(path, num_bytes=num_bytes))


def read_objects(
    root: Directory, record: CommitRecord
) -> tuple[Mapping[str, bytes | memoryview], list[Finding]]:
    """Return a shard's objects, and what is wrong with their bytes: one reading for both."""
    objects: dict[str, bytes | memoryview] = {}
    findings: list[Finding] = []
    for key, expected in record.objects.items():
        path = f"shards/{record.shard_id}/{key}"
        try:
            objects[key] = root.read_large(path, num_bytes=expected.num_bytes)
        except FileNotFoundError:
            findings += _compare(record, key, None)
        else:
            findings += _compare(record, key, ObjectDigest.of(objects[key]))
    return objects, findings


def _compare(record: CommitRecord, key: str, found: ObjectDigest | None) -> Iterator[Finding]:
    expected = record.objects[key]
    if found is None:
        yield shard_finding(record.shard_id, key, f"is missing, committed {expected}")
    elif found != expected:
        yield shard_finding(record.shard_id, key, f"has {found}, committed {expected}")


def check_states(
    root: Directory,
    record: CommitRecord,
    identity: StoreIdentity,
    recompute: Recompute,
    *,
    exact: bool = False,
) -> Iterator[Finding]:
    """Yield findings on a shard's bytes or, if these are whole, on what they mean.

    With `exact`, states that the store leaves out must have the bits that generation gave them.
    """
    objects, damaged = read_objects(root, record)
    yield from damaged or check_meaning(record, objects, identity, recompute, exact=exact)


def check_meaning(
    record: CommitRecord,
    objects: Mapping[str, bytes | memoryview],
    identity: StoreIdentity,
    recompute: Recompute,
    *,
    exact: bool = False,
) -> Iterator[Finding]:
    """Yield findings on what a shard's whole bytes mean; see `check_states`."""
    if not record.probe:
        return
    try:
        samples = _probed_samples(record, objects, identity)
    except CorruptError as error:  # its bytes are the committed ones, but they are no shard
        yield shard_finding(record.shard_id, min(record.objects), str(error))
        return
    states_array = "last_hidden_state" if identity.left_out is None else "aux_hidden_states"
    completed = {sample_id: recompute.complete(sample) for sample_id, sample in samples.items()}
    for problem in disagreements(record.probe, completed, recompute, identity, exact=exact):
        yield shard_finding(record.shard_id, states_array, problem)


def _probed_samples(
    record: CommitRecord, objects: Mapping[str, bytes | memoryview], identity: StoreIdentity
) -> Mapping[str, StoredSample]:
    shard = decode_shard(record.shard_id, objects, identity=identity)
    probed = {point.sample_id for point in record.probe}
    return {
        sample_id: shard.sample(position)
        for position, sample_id in enumerate(shard.sample_ids)
        if sample_id in probed
    }


def shard_finding(shard_id: str, key: str, problem: str) -> Finding:
    """Return the finding that one object of a shard is damaged."""
    object_key = f"shards/{shard_id}/{key}"
    return Finding(shard_id=shard_id, object_key=object_key, problem=problem, remedy=REPAIR)
