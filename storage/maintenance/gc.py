"""Garbage collection: remove what no kept snapshot needs, records before data.

The shards of a plan are kept until a snapshot has its samples, even if the plan is incomplete,
unless the caller gives the plan up. A damaged snapshot is removed, and samples that only it held
count as not published. A kill in the middle leaves unreferenced data, which the next collection
removes.

Young objects are kept, too: another process may be about to refer to them. Attempts that no commit
record names, and temporary files, are garbage once they are old: killed processes and concurrent
writers leave them behind.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import numpy as np

from storage.errors import ConfigError, CorruptError
from storage.maintenance import OLDER_THAN_HOURS
from storage.objects.listing import Entry
from storage.objects.local_files import TEMPORARY_SUFFIX
from storage.records import keys
from storage.records.commit_log import revocations
from storage.records.commits import Commits
from storage.records.manifest import KINDS
from storage.records.plan import Plan, PlannedShard
from storage.records.sample_rows import is_id
from storage.records.snapshot import Snapshot
from storage.store import Store

_FOLDERS_OF_RECORDS = (
    keys.RECORDS,
    keys.PLANS,
    keys.SNAPSHOTS,
    keys.MANIFESTS,
    keys.REVOCATIONS,
    keys.EXCLUSIONS,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """The unneeded content of a store."""

    snapshot_ids: tuple[str, ...]
    plan_ids: tuple[str, ...]
    shard_ids: tuple[str, ...]
    data_keys: tuple[str, ...]
    """Keys of the objects of these shards; objects that are written for them later stay."""
    leftovers: tuple[str, ...]
    """Other keys: what killed processes and concurrent writers left behind."""
    num_bytes: int
    young_bytes: int
    """Size of unneeded objects that are younger than the limit."""
    revocations: tuple[str, ...]
    """Keys of revocations without a row to revoke: a few bytes that are removed with the rest, but
    do not count as garbage by themselves."""

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return bool(self.snapshot_ids or self.plan_ids or self.shard_ids or self.leftovers)


def snapshots_to_keep(
    store: Store,
    *,
    named: Collection[str] = (),
    released: Collection[str] = (),
    older_than_hours: float = OLDER_THAN_HOURS,
) -> Mapping[str, str]:
    """Return the snapshots to keep, each with the reason, the latest first.

    With `named`, only those, the latest and the young ones are kept. Otherwise these are kept: the
    latest, every named split of a data set, every one held by a run that has not ended, and every
    other that is neither superseded (more than half of its samples are in one of these) nor a
    subset of a larger kept one. A damaged one without a name is not kept. Snapshots that only
    `released` runs hold are not kept for them.

    Raises:
        ConfigError: a `released` run holds no snapshot; names the runs that do.

    """
    _require_held(store, released)
    present = store.snapshot_ids()
    if not present:
        return {}
    latest = store.snapshot().snapshot_id
    young = _young_snapshots(store, older_than_hours)
    if named:
        requested = dict.fromkeys(sorted(set(named) - {latest}), "requested")
        return {latest: "the latest", **(young | requested)}
    reasons, current = _named(store, latest, present, released)
    others: list[tuple[str, frozenset[bytes]]] = []
    for snapshot in _readable(store, [name for name in present if name not in reasons]):
        members = snapshot.members
        if not any(len(members & newer) > len(members) / 2 for newer in current):
            others.append((snapshot.snapshot_id, members))
    kept: list[tuple[str, frozenset[bytes]]] = []
    for snapshot_id, members in sorted(others, key=lambda other: -len(other[1])):
        if not any(members <= larger for _, larger in kept):
            kept.append((snapshot_id, members))
    unique = dict.fromkeys(sorted(name for name, _ in kept), "no newer one has its data")
    return reasons | (young | unique | reasons)


def _young_snapshots(store: Store, older_than_hours: float) -> dict[str, str]:
    """Return recently published snapshots, which may not have a name yet.

    Damaged ones are not among them: the recent write may be the damage.
    """
    entries, is_old = store.root.entries(keys.SNAPSHOTS), _is_older(older_than_hours)
    young = [
        name
        for name in store.snapshot_ids()
        if (entry := entries.get(f"{name}{keys.PARQUET_SUFFIX}")) and not is_old(entry)
    ]
    why = f"younger than {older_than_hours:g} hours"
    return {snapshot.snapshot_id: why for snapshot in _readable(store, young)}


def _is_older(hours: float) -> Callable[[Entry], bool]:
    """Return a predicate: was an object last written so long ago? With 0 hours, all were."""
    limit = time.time() - hours * 3600 if hours else float("inf")
    return lambda entry: entry.modified <= limit


def _named(
    store: Store, latest: str, present: Collection[str], released: Collection[str]
) -> tuple[dict[str, str], Sequence[frozenset[bytes]]]:
    """Return the reason to keep each snapshot with a name, and the members of these."""
    reasons = {latest: ["the latest"]}
    for name, snapshot_id in store.refs.names().items():
        if snapshot_id in present:
            reasons.setdefault(snapshot_id, []).append(name)
    members = {name: store.snapshot(name).members for name in reasons}
    held = [
        (run, name) for run, name in store.refs.held() if name in present and run not in released
    ]
    for snapshot in _readable(store, {name for _, name in held} - members.keys()):
        members[snapshot.snapshot_id] = snapshot.members
    for run, name in held:
        if name in members:
            reasons.setdefault(name, []).append(f"held by run {run}")
    return {name: ", ".join(why) for name, why in reasons.items()}, list(members.values())


def _require_held(store: Store, runs: Collection[str]) -> None:
    held = {run for run, _ in store.refs.held()} if runs else set()
    for run in runs:
        if run not in held:
            names = ", ".join(sorted(held)) or "none"
            raise ConfigError(
                f"{store.root.url} holds no snapshot for run {run}; it does for: {names}"
            )


def _readable(store: Store, snapshot_ids: Collection[str]) -> Iterator[Snapshot]:
    for snapshot_id in snapshot_ids:
        with suppress(CorruptError):
            yield store.snapshot(snapshot_id)


def find_garbage(
    store: Store,
    *,
    keep: Collection[str],
    keep_unfinished: bool = True,
    older_than_hours: float = OLDER_THAN_HOURS,
) -> Garbage:
    """Return everything that no snapshot of `keep` and no plan still to be published needs.

    If there is no snapshot at all, no shard is garbage: the snapshots may have been lost. Neither
    is any object of a shard whose commit record was lost: it is unknown which ones it named.

    Raises:
        ConfigError: `keep` names a snapshot that does not exist, or lacks the latest one.

    """
    present = store.snapshot_ids()
    kept = _checked(store, keep, present)
    plans, is_old = store.plans.all(), _is_older(older_than_hours)
    commits, damaged = store.log.read_what_is_sound()
    committed = commits.keys() | damaged.keys()
    objects = _objects(store, committed)
    unfinished = _unfinished(store, plans, commits, committed, present)
    of_snapshots = {s for snapshot_id in kept for s in store.snapshot(snapshot_id).shard_ids}
    if present:
        needed = of_snapshots | (_shards_of(plans, unfinished) if keep_unfinished else set())
        unknown = damaged.keys() | (of_snapshots - committed)  # a record that was lost
    else:
        needed = set(objects)
        planned = _shards_of(plans, unfinished) if committed else set()
        unknown = damaged.keys() | (needed - committed - planned)
    unneeded = objects.keys() - needed
    gone = {name for name in unneeded if all(map(is_old, objects[name].values()))}
    loose = _loose(store)
    for name in (objects.keys() & needed) - unknown:
        objects_named = commits.objects(name) if name in commits else ()
        named = {keys.shard_object(name, key) for key in objects_named}
        loose |= {key: entry for key, entry in objects[name].items() if key not in named}
    leftovers = {key: entry for key, entry in loose.items() if is_old(entry)}
    removed = [*leftovers.values(), *(e for name in gone for e in objects[name].values())]
    young = [entry for key, entry in loose.items() if key not in leftovers]
    young += [entry for name in unneeded - gone for entry in objects[name].values()]
    written = store.root.entries(keys.PLANS)
    given_up = {
        plan_id
        for plan_id in (() if keep_unfinished or not present else unfinished)
        if is_old(written[f"{plan_id}{keys.JSON_SUFFIX}"])
    }
    return Garbage(
        snapshot_ids=tuple(snapshot_id for snapshot_id in present if snapshot_id not in kept),
        plan_ids=tuple(
            plan.plan_id
            for plan in plans
            if plan.plan_id in given_up or any(shard.shard_id in gone for shard in plan.shards)
        ),
        shard_ids=tuple(sorted(gone)),
        data_keys=tuple(sorted(key for name in gone for key in objects[name])),
        leftovers=tuple(sorted(leftovers)),
        num_bytes=sum(entry.num_bytes for entry in removed),
        young_bytes=sum(entry.num_bytes for entry in young),
        revocations=tuple(key for key, entry in _stale_revocations(store).items() if is_old(entry)),
    )


def _checked(store: Store, keep: Collection[str], present: Sequence[str]) -> set[str]:
    """Return the snapshots to keep; ConfigError if one does not exist, or the latest is missing."""
    kept = set(keep)
    if not kept <= set(present):
        raise ConfigError(
            f"{store.root.url} has no snapshot {min(kept - set(present))}; it has: "
            f"{', '.join(present) or 'none'}"
        )
    latest = store.snapshot().snapshot_id if present else None
    if latest is not None and latest not in kept:
        raise ConfigError(f"{latest} is the latest snapshot; keep it, or publish another first")
    return kept


def _shards_of(plans: Sequence[Plan], plan_ids: Collection[str]) -> set[str]:
    return {s.shard_id for plan in plans if plan.plan_id in plan_ids for s in plan.shards}


def _objects(store: Store, committed: Collection[str]) -> Mapping[str, Mapping[str, Entry]]:
    """Return the objects below each shard's folder, by shard (committed or not) and key."""
    found: dict[str, dict[str, Entry]] = {shard_id: {} for shard_id in committed}
    for key, entry in store.root.entries(keys.SHARDS).items():
        name, _, below = key.partition("/")
        if below and is_id(name):
            found.setdefault(name, {})[f"{keys.SHARDS}/{key}"] = entry
    return found


def _loose(store: Store) -> dict[str, Entry]:
    """Return objects of no shard: temporary files, and incomplete manifests of a compaction."""
    manifests = store.log.manifests()
    whole = {
        key
        for manifest in manifests
        for kind in KINDS
        for key in keys.manifest_copies(manifest.manifest_id, kind)
    }
    return dict(store.root.temporaries()) | {
        f"{prefix}/{key}": entry
        for prefix in _FOLDERS_OF_RECORDS
        for key, entry in store.root.entries(prefix).items()
        if key.endswith(TEMPORARY_SUFFIX)
        or (prefix == keys.MANIFESTS and f"{prefix}/{key}" not in whole)
    }


def _stale_revocations(store: Store) -> Mapping[str, Entry]:
    """Return the revocations of records that are no longer in a manifest."""
    manifests = store.log.manifests()
    rows = {
        keys.revocation(shard_id, name)
        for shard_id, name in revocations(store.root)
        if any(manifest.record_id_of(shard_id) == name for manifest in manifests)
    }
    return {
        f"{keys.REVOCATIONS}/{key}": entry
        for key, entry in store.root.entries(keys.REVOCATIONS).items()
        if f"{keys.REVOCATIONS}/{key}" not in rows and key.endswith(keys.JSON_SUFFIX)
    }


def _unfinished(
    store: Store,
    plans: Sequence[Plan],
    commits: Commits,
    committed: Collection[str],
    snapshot_ids: Collection[str],
) -> set[str]:
    """Return the plans with a sample that is in no committed shard of any snapshot yet."""
    snapshots = list(_readable(store, snapshot_ids))
    named = {shard_id for snapshot in snapshots for shard_id in snapshot.shard_ids}
    published = {shard_id for shard_id in named if shard_id in committed}
    members: set[bytes] = set()
    if any(shard.shard_id not in published for plan in plans for shard in plan.shards):
        members.update(*(_committed_members(snapshot, committed) for snapshot in snapshots))

    def is_published(shard: PlannedShard) -> bool:
        return shard.shard_id in published or all(
            bytes.fromhex(name) in members for name in commits.usable(shard.sample_ids)
        )

    return {plan.plan_id for plan in plans if not all(map(is_published, plan.shards))}


def _committed_members(snapshot: Snapshot, committed: Collection[str]) -> Iterable[bytes]:
    """Return the samples of a snapshot whose shards are committed."""
    is_there = np.array([shard_id in committed for shard_id in snapshot.shard_ids], np.bool_)
    return cast("list[bytes]", snapshot.sample_ids[is_there[snapshot.groups]].tolist())


def collect(store: Store, garbage: Garbage) -> None:
    """Remove garbage: references first, then what they refer to. No writer may be running."""
    gone = set(garbage.shard_ids)
    kept = set(store.shard_ids()) - gone
    for plan_id in garbage.plan_ids:
        # Kept shards must stay planned: a repair may find a shard's samples nowhere else.
        plan = store.plans.load(plan_id)
        left = Plan.of(shard for shard in plan.shards if shard.shard_id in kept)
        if left.plan_id != plan_id:
            store.plans.save(left)
            store.plans.delete(plan_id)
    for snapshot_id in garbage.snapshot_ids:  # no plan names its shards any more
        store.refs.remove(snapshot_id)
        store.root.delete(keys.snapshot(snapshot_id))
    present = _readable(store, store.snapshot_ids())
    published = {shard_id for snapshot in present for shard_id in snapshot.shard_ids}
    removed = gone - published  # published by another process after the search
    for shard_id in sorted(removed):
        store.revoke(shard_id)
    store.root.delete_many([key for key in garbage.data_keys if key.split("/")[1] in removed])
    for key in (*garbage.leftovers, *garbage.revocations):
        store.root.delete(key)
