"""Garbage collection: drop what no kept snapshot needs, records before data.

What an unfinished plan has made so far is kept, since its snapshot is still to come. A kill in the
middle leaves data without a record, which is no shard; the next collection removes it.
"""

from collections.abc import Collection
from dataclasses import dataclass

from storage.errors import ConfigError
from storage.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """What a store holds that nothing needs."""

    snapshot_ids: tuple[str, ...]
    plan_ids: tuple[str, ...]
    shard_ids: tuple[str, ...]
    num_bytes: int


def find_garbage(store: Store, *, keep: Collection[str]) -> Garbage:
    """Return what no snapshot of `keep` needs; ConfigError if that lacks the latest one."""
    present = store.snapshot_ids()
    kept = set(keep)
    if not kept <= set(present):
        raise ConfigError(f"{store.root.root} has no snapshot {min(kept - set(present))}")
    latest = store.snapshot().snapshot_id if present else None
    if latest is not None and latest not in kept:
        raise ConfigError(f"{latest} is the latest snapshot; keep it, or publish another first")
    needed = {shard for snapshot_id in kept for shard in store.snapshot(snapshot_id).shard_ids}
    needed |= {
        shard.shard_id
        for plan in store.plans()
        if store.missing_shards(plan)
        for shard in plan.shards
    }
    found = store.shard_sizes()
    unneeded = sorted(found.keys() - needed)
    gone = set(unneeded)
    return Garbage(
        snapshot_ids=tuple(snapshot_id for snapshot_id in present if snapshot_id not in kept),
        plan_ids=tuple(
            plan.plan_id
            for plan in store.plans()
            if any(shard.shard_id in gone for shard in plan.shards)
        ),
        shard_ids=tuple(unneeded),
        num_bytes=sum(found[shard_id] for shard_id in unneeded),
    )


def collect(store: Store, garbage: Garbage) -> None:
    """Remove garbage: first what refers, then what is referred to. No writer may be at work."""
    for snapshot_id in garbage.snapshot_ids:
        store.root.delete(f"snapshots/{snapshot_id}.parquet")
    for plan_id in garbage.plan_ids:
        store.root.delete(f"plans/{plan_id}.json")
    for shard_id in garbage.shard_ids:
        store.revoke(shard_id)
        store.root.delete_all(f"shards/{shard_id}")
