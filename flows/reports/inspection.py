"""The contents of a store, as plain figures. Needs no target and no torch: works on any machine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from storage.errors import ConfigError, CorruptError
from storage.maintenance.gc import Garbage, find_garbage, snapshots_to_keep
from storage.records import keys
from storage.records.exclusions import Exclusion
from storage.records.identity import StoreIdentity
from storage.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotFigures:
    """One published snapshot."""

    snapshot_id: str
    num_samples: int
    num_tokens: int
    num_shards: int
    is_latest: bool
    names: tuple[str, ...]
    """Splits of data sets with this snapshot, and runs that hold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedPlan:
    """A plan with missing shards."""

    plan_id: str
    num_shards: int
    num_missing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreFigures:
    """The contents of a store."""

    root: str
    identity: StoreIdentity
    num_shards: int
    num_probed: int
    """Shards whose record has a semantic probe."""
    num_samples: int
    num_tokens: int
    num_supervised: int
    stored_bytes: int
    raw_bytes: int
    snapshots: tuple[SnapshotFigures, ...]
    """The latest first."""
    unfinished: tuple[UnfinishedPlan, ...]
    garbage: Garbage | None
    """What `gc` would drop; None if damage hides what is needed."""
    excluded: tuple[Exclusion, ...]
    """Samples that the store excludes."""
    damaged: tuple[str, ...]
    """Keys of unreadable documents."""
    free_bytes: int | None


def inspect_store(root: str) -> StoreFigures:
    """Return the figures of the store at a path or URL; ConfigError if there is none."""
    store = Store.open(root)
    damaged: list[str] = []
    commits, unreadable = store.log.read_what_is_sound()
    damaged += [finding.object_key for finding in store.exclusions.findings()]
    damaged += [keys.record(shard_id) for shard_id in unreadable]
    totals = commits.totals
    snapshots = tuple(_snapshots(store, damaged))
    garbage = _garbage(store)
    return StoreFigures(
        root=store.root.url,
        identity=store.identity,
        num_shards=len(store.shard_ids()),
        num_probed=totals.num_probed,
        num_samples=totals.num_samples,
        num_tokens=totals.num_tokens,
        num_supervised=totals.num_supervised,
        stored_bytes=totals.stored_bytes,
        raw_bytes=totals.raw_bytes,
        snapshots=tuple(sorted(snapshots, key=lambda found: not found.is_latest)),
        unfinished=() if garbage is None else tuple(_unfinished(store)),
        garbage=garbage,
        excluded=tuple(store.exclusions.read()),
        damaged=tuple(damaged),
        free_bytes=store.free_bytes(),
    )


def _snapshots(store: Store, damaged: list[str]) -> Iterator[SnapshotFigures]:
    present = store.snapshot_ids()
    latest = _latest(store)
    names = _names(store, damaged)
    for snapshot_id in present:
        try:
            snapshot = store.snapshot(snapshot_id)
        except CorruptError:
            damaged.append(keys.snapshot(snapshot_id))
            continue
        yield SnapshotFigures(
            snapshot_id=snapshot_id,
            num_samples=snapshot.num_samples,
            num_tokens=snapshot.num_tokens,
            num_shards=len(snapshot.shard_ids),
            is_latest=snapshot_id == latest,
            names=tuple(names.get(snapshot_id, ())),
        )
    if present and latest is None:
        damaged.append("the latest snapshot or its name")


def _names(store: Store, damaged: list[str]) -> Mapping[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    try:
        for name, snapshot_id in store.refs.names().items():
            found.setdefault(snapshot_id, []).append(name)
    except CorruptError:
        damaged.append("the name of a snapshot")
    for run, snapshot_id in store.refs.held():
        found.setdefault(snapshot_id, []).append(f"held by run {run}")
    return found


def _latest(store: Store) -> str | None:
    try:
        return store.snapshot().snapshot_id
    except (CorruptError, ConfigError):
        return None


def _unfinished(store: Store) -> Iterator[UnfinishedPlan]:
    for plan, missing in store.plans.unfinished():
        yield UnfinishedPlan(
            plan_id=plan.plan_id, num_shards=len(plan.shards), num_missing=len(missing)
        )


def _garbage(store: Store) -> Garbage | None:
    try:
        return find_garbage(store, keep=snapshots_to_keep(store))
    except (CorruptError, ConfigError):
        return None
