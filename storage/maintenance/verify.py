"""Check everything in a store and report all differences from what was committed."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence

from storage.errors import PUBLISH, REPAIR, REPLAN, RESTORE, CorruptError
from storage.objects.sealed_json import unseal
from storage.recompute import Recompute
from storage.records import keys
from storage.records.commit_record import CommitRecord
from storage.records.manifest import KINDS, MISSING
from storage.records.presence import Finding, check_sizes
from storage.shard_checks import check_digests, check_states
from storage.store import Store

WRITING_SECONDS = 3600.0
"""Longer than it takes to write both copies of a manifest."""


def verify_store(
    store: Store,
    *,
    deep: bool,
    recompute: Recompute | None = None,
    on_shard: Callable[[str], None] = lambda _shard_id: None,
) -> Sequence[Finding]:
    """Return all damage: check the size of every committed object, or with `deep` every byte.

    With `recompute`, the states of every intact shard must also reproduce its semantic probe.
    `on_shard` is called after each shard: reading a large store takes hours.
    """
    findings: list[Finding] = []
    commits, damaged = store.log.read_what_is_sound()
    for shard_id, error in damaged.items():
        key = keys.record(shard_id)
        findings.append(
            Finding(shard_id=shard_id, object_key=key, problem=str(error), remedy=REPAIR)
        )
        on_shard(shard_id)
    for record in commits.values():
        findings.extend(_shard_findings(store, record, deep=deep, recompute=recompute))
        on_shard(record.shard_id)
    committed = commits.keys() | damaged.keys()
    return [
        *findings,
        *_manifest_findings(store),
        *_snapshot_findings(store, committed),
        *_latest_findings(store),
        *store.refs.findings(store.snapshot_ids()),
        *_plan_findings(store),
        *store.exclusions.findings(),
    ]


def verify_shard(
    store: Store, shard_id: str, *, recompute: Recompute, exact: bool = False
) -> Sequence[Finding]:
    """Return the damage of one shard: every byte, and its semantic probe.

    With `exact`, recomputed states must have the recorded bits, not only be close to them.
    """
    record = store.commit(shard_id)
    return list(check_states(store.root, record, store.identity, recompute, exact=exact))


def _shard_findings(
    store: Store, record: CommitRecord, *, deep: bool, recompute: Recompute | None
) -> Iterator[Finding]:
    if recompute is not None:
        return check_states(store.root, record, store.identity, recompute)
    return check_digests(store.root, record) if deep else check_sizes(store.root, record)


def _manifest_findings(store: Store) -> Iterator[Finding]:
    entries = store.root.entries(keys.MANIFESTS)
    for manifest in store.log.manifests():
        copies = [key for kind in KINDS for key in keys.manifest_copies(manifest.manifest_id, kind)]
        there = [entries[name] for key in copies if (name := key.partition("/")[2]) in entries]
        newest = max((entry.modified for entry in there), default=0.0)
        for key, problem in manifest.damage():
            if problem == MISSING and newest > time.time() - WRITING_SECONDS:
                continue  # being written, or a kill interrupted that: publishing completes it
            yield Finding(shard_id=None, object_key=key, problem=problem, remedy=RESTORE)


def _snapshot_findings(store: Store, commits: Collection[str]) -> Iterator[Finding]:
    for snapshot_id in store.snapshot_ids():
        try:
            snapshot = store.snapshot(snapshot_id)
        except CorruptError as error:
            yield Finding(
                shard_id=None,
                object_key=keys.snapshot(snapshot_id),
                problem=str(error),
                remedy=PUBLISH,
            )
            continue
        for shard_id in snapshot.shard_ids:
            if shard_id not in commits:
                yield Finding(
                    shard_id=shard_id,
                    object_key=keys.record(shard_id),
                    problem=f"is missing, snapshot {snapshot_id} needs it",
                    remedy=REPAIR,
                )


def _latest_findings(store: Store) -> Iterator[Finding]:
    """Check the name of the latest snapshot; a store without snapshots needs none."""
    present = store.snapshot_ids()
    if not present:
        return
    problem = None
    try:
        latest = unseal(store.root.read(keys.LATEST), what=keys.LATEST).get("snapshot_id")
        if latest not in present:
            problem = f"names snapshot {latest}, which does not exist"
    except FileNotFoundError:
        problem = "is missing, but snapshots exist"
    except CorruptError as error:
        problem = str(error)
    if problem is not None:
        yield Finding(shard_id=None, object_key=keys.LATEST, problem=problem, remedy=PUBLISH)


def _plan_findings(store: Store) -> Iterator[Finding]:
    for key in store.root.sizes(keys.PLANS):
        plan_id = keys.without(key, keys.JSON_SUFFIX)
        if plan_id is None:
            continue
        try:
            store.plans.load(plan_id)
        except CorruptError as error:
            yield Finding(
                shard_id=None, object_key=keys.plan(plan_id), problem=str(error), remedy=REPLAN
            )
