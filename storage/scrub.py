"""Look at everything a store holds and report all that is not as it was committed."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from storage.errors import CorruptError
from storage.probe import Recompute
from storage.verify import REPAIR, Finding, check_digests, check_sizes, check_states

if TYPE_CHECKING:
    from storage.store import Store


def scrub(store: "Store", *, deep: bool, recompute: Recompute | None) -> Sequence[Finding]:
    """Return all damage: sizes, with `deep` every byte, with `recompute` what the states mean."""
    return [*_shard_findings(store, deep, recompute), *_snapshot_findings(store)]


def _shard_findings(store: "Store", deep: bool, recompute: Recompute | None) -> Iterator[Finding]:
    for shard_id in store.shard_ids():
        try:
            record = store.commit(shard_id)
        except CorruptError as error:
            yield Finding(
                shard_id=shard_id,
                object_key=f"commits/{shard_id}.json",
                problem=str(error),
                remedy=REPAIR,
            )
            continue
        if recompute is not None:
            yield from check_states(store.root, record, store.identity, recompute)
        elif deep:
            yield from check_digests(store.root, record)
        else:
            yield from check_sizes(store.root, record)


def _snapshot_findings(store: "Store") -> Iterator[Finding]:
    commits = set(store.shard_ids())
    for snapshot_id in store.snapshot_ids():
        try:
            snapshot = store.snapshot(snapshot_id)
        except CorruptError as error:
            yield Finding(
                shard_id=None,
                object_key=f"snapshots/{snapshot_id}.parquet",
                problem=str(error),
                remedy="publish the snapshot again",
            )
            continue
        for shard_id in snapshot.shard_ids:
            if shard_id not in commits:
                yield Finding(
                    shard_id=shard_id,
                    object_key=f"commits/{shard_id}.json",
                    problem=f"is missing, snapshot {snapshot_id} needs it",
                    remedy=REPAIR,
                )
