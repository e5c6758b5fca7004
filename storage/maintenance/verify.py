"""Look at everything a store holds and report all that is not as it was committed."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from storage.errors import CorruptError
from storage.objects.sealed_json import unseal
from storage.recompute import Recompute
from storage.records.commit_record import CommitRecord
from storage.records.manifest import FOLDER as MANIFESTS
from storage.records.manifest import KINDS, MISSING, keys_of
from storage.records.presence import (
    MEND,
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
WRITING_SECONDS = 3600.0
"""Longer than it takes to write both copies of a manifest."""


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
    commits, damaged = store.log.read_what_is_sound()
    for shard_id, error in damaged.items():
        key = f"commits/{shard_id}.json"
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


def _shard_findings(
    store: "Store", record: CommitRecord, *, deep: bool, recompute: Recompute | None
) -> Iterator[Finding]:
    if recompute is not None:
        return check_states(store.root, record, store.identity, recompute)
    return check_digests(store.root, record) if deep else check_sizes(store.root, record)


def _manifest_findings(store: "Store") -> Iterator[Finding]:
    entries = store.root.entries(MANIFESTS)
    for manifest in store.log.manifests():
        keys = [key for kind in KINDS for key in keys_of(manifest.manifest_id, kind)]
        there = [entries[name] for key in keys if (name := key.partition("/")[2]) in entries]
        newest = max((entry.modified for entry in there), default=0.0)
        for key, problem in manifest.damage():
            if problem == MISSING and newest > time.time() - WRITING_SECONDS:
                continue  # it is being written, or a kill ended that: publishing completes it
            yield Finding(shard_id=None, object_key=key, problem=problem, remedy=MEND)


def _snapshot_findings(store: "Store", commits: Collection[str]) -> Iterator[Finding]:
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
