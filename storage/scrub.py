"""Look at everything a store holds and report all that is not as it was committed."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from storage.canonical import unseal
from storage.errors import CorruptError
from storage.recompute import Recompute
from storage.verify import (
    PUBLISH,
    REPAIR,
    REPLAN,
    Finding,
    check_digests,
    check_sizes,
    check_states,
)

if TYPE_CHECKING:
    from storage.store import Store

LATEST = "snapshots/latest.json"


def scrub(
    store: "Store",
    *,
    deep: bool,
    recompute: Recompute | None,
    on_shard: Callable[[str], None] = lambda _shard_id: None,
) -> Sequence[Finding]:
    """Return all damage: sizes, with `deep` every byte, with `recompute` what the states mean.

    `on_shard` is called after each shard: reading a large store takes hours.
    """
    findings: list[Finding] = []
    for shard_id in store.shard_ids():
        findings.extend(_shard_findings(store, shard_id, deep=deep, recompute=recompute))
        on_shard(shard_id)
    return [
        *findings,
        *_snapshot_findings(store),
        *_latest_findings(store),
        *store.refs.findings(store.snapshot_ids()),
        *_plan_findings(store),
    ]


def _shard_findings(
    store: "Store", shard_id: str, *, deep: bool, recompute: Recompute | None
) -> Iterator[Finding]:
    try:
        record = store.commit(shard_id)
    except CorruptError as error:
        key = f"commits/{shard_id}.json"
        yield Finding(shard_id=shard_id, object_key=key, problem=str(error), remedy=REPAIR)
        return
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
                remedy=PUBLISH,
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


def _latest_findings(store: "Store") -> Iterator[Finding]:
    """Look at the name of the latest snapshot; a store without snapshots needs none."""
    present = store.snapshot_ids()
    if not present:
        return
    problem = None
    try:
        latest = unseal(store.root.read(LATEST), what=LATEST).get("snapshot_id")
        if latest not in present:
            problem = f"names snapshot {latest}, which is not there"
    except FileNotFoundError:
        problem = "is missing, but there are snapshots"
    except CorruptError as error:
        problem = str(error)
    if problem is not None:
        yield Finding(shard_id=None, object_key=LATEST, problem=problem, remedy=PUBLISH)


def _plan_findings(store: "Store") -> Iterator[Finding]:
    for key in store.root.sizes("plans"):
        if not key.endswith(".json"):
            continue
        try:
            store.load_plan(key.removesuffix(".json"))
        except CorruptError as error:
            yield Finding(
                shard_id=None, object_key=f"plans/{key}", problem=str(error), remedy=REPLAN
            )
