"""Check one shard against its commit record: every byte, and the semantic probe."""

from collections.abc import Iterator, Mapping
from functools import partial

from storage.encoding.shard import decode_shard
from storage.errors import CorruptError
from storage.objects.digests import ObjectDigest
from storage.objects.object_store import ObjectStore
from storage.objects.retry import retried
from storage.probe import disagreements
from storage.recompute import Recompute
from storage.records import keys
from storage.records.commit_record import CommitRecord
from storage.records.identity import StoreIdentity
from storage.records.presence import Finding, shard_finding
from storage.samples import StoredSample


def check_digests(root: ObjectStore, record: CommitRecord) -> Iterator[Finding]:
    """Yield a finding for every object of the shard whose bytes differ from the committed ones."""
    for key, expected in record.objects.items():
        path = keys.shard_object(record.shard_id, key)
        try:
            found = retried(partial(_digest, root, path, expected.num_bytes))
        except FileNotFoundError:
            found = None
        yield from _compare(record, key, found)


def _digest(root: ObjectStore, path: str, num_bytes: int) -> ObjectDigest:
    return ObjectDigest.of_pieces(root.pieces(path, num_bytes=num_bytes))


def read_objects(
    root: ObjectStore, record: CommitRecord
) -> tuple[Mapping[str, bytes | memoryview], list[Finding]]:
    """Return a shard's objects and the findings on their bytes, from a single read."""
    objects: dict[str, bytes | memoryview] = {}
    findings: list[Finding] = []
    for key, expected in record.objects.items():
        path = keys.shard_object(record.shard_id, key)
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
    root: ObjectStore,
    record: CommitRecord,
    identity: StoreIdentity,
    recompute: Recompute,
    *,
    exact: bool = False,
) -> Iterator[Finding]:
    """Yield findings on a shard's bytes or, if these are intact, on its semantic probe.

    With `exact`, omitted states must match the bits recorded at generation.
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
    """Yield findings on the semantic probe of a shard with intact bytes; see `check_states`."""
    if not record.probe:
        return
    try:
        samples = _probed_samples(record, objects, identity)
    except CorruptError as error:  # intact bytes that are not a shard
        yield shard_finding(record.shard_id, min(record.objects), str(error))
        return
    states_array = "last_hidden_state" if identity.omitted is None else "aux_hidden_states"
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
