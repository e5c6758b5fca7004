"""Garbage collection: drop what no kept snapshot needs, records before data.

What a plan has made is kept until a snapshot has its samples, complete or not, unless the caller
gives the plan up. A damaged snapshot is dropped, and what it alone held counts as not published. A
kill in the middle leaves what nothing plans or names; the next collection removes it.

What is young is kept, too: another process may be about to name it. Attempts that no commit record
names, and temporary files, are garbage once they are old: kills and rivals leave them behind.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import numpy as np

from storage.errors import ConfigError, CorruptError
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

OLDER_THAN_HOURS = 24.0
"""Longer than any process takes from writing something to naming it, clocks that differ included.
"""

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
    """What a store holds that nothing needs."""

    snapshot_ids: tuple[str, ...]
    plan_ids: tuple[str, ...]
    shard_ids: tuple[str, ...]
    data_keys: tuple[str, ...]
    """Of what these shards are made of: what is written for them later is not removed."""
    leftovers: tuple[str, ...]
    """Keys, beside those of the shards above: what kills and rivals left."""
    num_bytes: int
    young_bytes: int
    """Of what nothing needs either, but is younger than the limit."""
    revocations: tuple[str, ...]
    """Keys of notes that a record counts no more, where there is none that could: a few bytes that
    go with the rest, and are no reason to say that there is garbage."""

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(self.snapshot_ids or self.plan_ids or self.shard_ids or self.leftovers)


def snapshots_to_keep(
    store: Store,
    *,
    named: Collection[str] = (),
    released: Collection[str] = (),
    older_than_hours: float = OLDER_THAN_HOURS,
) -> Mapping[str, str]:
    """Return the snapshots to keep, each with why, the latest first.

    With `named`, those, the latest and the young are kept and no other. Otherwise these stay: the
    latest, each that is a split of a data set by name, each that a run holds which has not ended,
    and every other that is no earlier version of one of them: neither are more than half of its
    samples in one of them, nor all of them in a larger one. One that is damaged and has no name is
    not kept. What runs hold that are `released` is not kept for them.

    Raises:
        ConfigError: nothing is held for one of these; says for whom.

    """
    _require_held(store, released)
    present = store.snapshot_ids()
    if not present:
        return {}
    latest = store.snapshot().snapshot_id
    young = _young_snapshots(store, older_than_hours)
    if named:
        asked = dict.fromkeys(sorted(set(named) - {latest}), "as asked")
        return {latest: "the latest", **(young | asked)}
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
    """Return those that may have been published a moment ago, before they have a name.

    One that is damaged is none of them: it was written just now by whatever damaged it.
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
    """Return what tells whether something was last written so long ago; after no time, all is."""
    limit = time.time() - hours * 3600 if hours else float("inf")
    return lambda entry: entry.modified <= limit


def _named(
    store: Store, latest: str, present: Collection[str], released: Collection[str]
) -> tuple[dict[str, str], Sequence[frozenset[bytes]]]:
    """Return why each snapshot with a name is kept, and the members of these."""
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
            raise ConfigError(f"{store.root.url} holds nothing for run {run}; it does for: {names}")


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
    """Return what no snapshot of `keep`, and no plan that is still to be published, needs.

    Where there is no snapshot at all, that is no shard: it may be the snapshots that were lost. Nor
    is anything of a shard whose commit record was: nobody can tell which of its files it named.

    Raises:
        ConfigError: `keep` names a snapshot that is not there, or lacks the latest one.

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
    """Return the snapshots to keep; ConfigError if one is not there, or the latest is lacking."""
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
    """Return by shard, committed or not, what lies below its folder, by key."""
    found: dict[str, dict[str, Entry]] = {shard_id: {} for shard_id in committed}
    for key, entry in store.root.entries(keys.SHARDS).items():
        name, _, below = key.partition("/")
        if below and is_id(name):
            found.setdefault(name, {})[f"{keys.SHARDS}/{key}"] = entry
    return found


def _loose(store: Store) -> dict[str, Entry]:
    """Return what no shard is made of: temporary files, and what compacting left of manifests."""
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
    """Return the revocations of records that are neither alone nor in a manifest any more."""
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
    """Remove garbage: first what refers, then what is referred to. No writer may be at work."""
    gone = set(garbage.shard_ids)
    kept = set(store.shard_ids()) - gone
    for plan_id in garbage.plan_ids:
        # What stays must still be planned: a repair may know a shard's samples from nowhere else.
        plan = store.plans.load(plan_id)
        left = Plan.of(shard for shard in plan.shards if shard.shard_id in kept)
        if left.plan_id != plan_id:
            store.plans.save(left)
            store.plans.delete(plan_id)
    for snapshot_id in garbage.snapshot_ids:  # no plan names its shards any more
        store.refs.forget(snapshot_id)
        store.root.delete(keys.snapshot(snapshot_id))
    present = _readable(store, store.snapshot_ids())
    published = {shard_id for snapshot in present for shard_id in snapshot.shard_ids}
    removed = gone - published  # by another process, since the garbage was found
    for shard_id in sorted(removed):
        store.revoke(shard_id)
    store.root.delete_many([key for key in garbage.data_keys if key.split("/")[1] in removed])
    for key in (*garbage.leftovers, *garbage.revocations):
        store.root.delete(key)
