"""From findings to the shards that must be regenerated, each with exactly the samples it had."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from storage.errors import CorruptError
from storage.records import keys
from storage.records.plan import PlannedShard, shard_id
from storage.records.presence import Finding
from storage.records.snapshot import Snapshot
from storage.store import Store


def damaged_shards(store: Store, findings: Iterable[Finding]) -> Sequence[PlannedShard]:
    """Return the damaged shards as they were planned; CorruptError if one has unknown samples.

    To repair one: `store.revoke(shard.shard_id)`, compute its samples, `store.write_shard`.
    """
    wanted = sorted({f.shard_id for f in findings if f.shard_id is not None})
    known: dict[str, PlannedShard] = {}
    for candidate in _candidates(store, wanted):
        if candidate.shard_id in wanted:
            known.setdefault(candidate.shard_id, candidate)
        if len(known) == len(wanted):
            break
    unknown = [shard for shard in wanted if shard not in known]
    if unknown:
        raise CorruptError(
            f"the samples of {len(unknown)} damaged shards are unknown, first {unknown[0]}: delete "
            f"{keys.record(unknown[0])} (and the other records) below {store.root.url}, then run "
            "the hidden-states flow, which plans their samples again"
        )
    return [known[shard] for shard in wanted]


def _candidates(store: Store, wanted: Sequence[str]) -> Iterator[PlannedShard]:
    """Yield shards with their samples, from the likeliest source to the last resort."""
    for wanted_id in wanted:
        try:
            record = store.commit(wanted_id)
        except CorruptError:
            continue
        yield PlannedShard(
            shard_id=record.shard_id, sample_ids=record.sample_ids, num_tokens=record.num_tokens
        )
    for plan in store.plans.all():
        yield from plan.shards
    for snapshot_id in store.snapshot_ids():
        with suppress(CorruptError):  # reported separately; another snapshot may list the shard
            yield from _snapshot_shards(store.snapshot(snapshot_id), wanted)


def _snapshot_shards(snapshot: Snapshot, wanted: Sequence[str]) -> Iterator[PlannedShard]:
    for group, name in enumerate(snapshot.shard_ids):
        if name not in wanted:
            continue
        rows = (snapshot.groups == group).nonzero()[0]
        sample_ids = tuple(snapshot.sample_id(int(row)) for row in rows)
        if shard_id(sample_ids) == name:  # else the snapshot lists only some of its samples
            num_tokens = int(snapshot.lengths[rows].sum())
            yield PlannedShard(shard_id=name, sample_ids=sample_ids, num_tokens=num_tokens)
