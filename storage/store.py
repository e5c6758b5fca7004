"""A store: shards that exist only if their commit record does, and snapshots that list samples.

Layout and write order are in `docs/store-format.md`. The store is the only source of truth about
what exists: after any interruption, running the same command again ends in the same bytes.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from storage.errors import (
    PUBLISH,
    REPAIR,
    ConfigError,
    CorruptError,
    ShardMissingError,
    StorageError,
)
from storage.objects.object_cache import ObjectCache
from storage.objects.object_store import ObjectStore
from storage.objects.sealed_json import seal, unseal
from storage.reader import CACHE_BYTES, SnapshotReader
from storage.recompute import Recompute
from storage.records import keys
from storage.records.commit_log import CommitLog
from storage.records.commit_record import CommitRecord
from storage.records.commits import Commits
from storage.records.compaction import compact, is_worth_compacting
from storage.records.identity import FORMAT_VERSION, StoreIdentity
from storage.records.plan import Plan, PlannedSample, PlannedShard, plan_shards
from storage.records.plans import Plans
from storage.records.presence import check_presence
from storage.records.probe_point import ProbePoint
from storage.records.refs import Refs
from storage.records.snapshot import Snapshot
from storage.samples import StoredSample
from storage.shared_shards import SharedShards
from storage.writer import ShardWriter

logger = logging.getLogger(__name__)


class Store:
    """The hidden-state store at one root."""

    def __init__(self, root: ObjectStore, identity: StoreIdentity) -> None:
        """Use `Store.create` or `Store.open` instead."""
        self.identity = identity
        self.root = root
        self.refs = Refs(root)
        self.log = CommitLog(root, identity.identity_id)
        self.plans = Plans(root, self.log)
        self.exclusions = self.log.exclusions
        self._writer = ShardWriter(root=root, identity=identity, log=self.log)

    @classmethod
    def create(cls, root: str, identity: StoreIdentity) -> "Store":
        """Create a store or open the existing one; MismatchError if it holds different states."""
        object_store = ObjectStore.at(root)
        object_store.create(keys.IDENTITY, identity.to_json())
        store = cls.open(root)
        store.identity.require_equal(identity, where=f"the store at {object_store.url}")
        return store

    @classmethod
    def open(cls, root: str) -> "Store":
        """Open the store at a local path or fsspec URL; ConfigError if there is none."""
        object_store = ObjectStore.at(root)
        try:
            data = object_store.read(keys.IDENTITY)
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no store at {object_store.url} (no {keys.IDENTITY}); run a "
                "hidden-states flow to create one, or correct the path"
            ) from error
        return cls(object_store, StoreIdentity.from_json(data))

    @property
    def is_local(self) -> bool:
        """Return whether the store is on a disk of this machine."""
        return self.root.is_local

    # ---- what exists

    def commits(self) -> Commits:
        """Return all committed shards; CorruptError if a record or a manifest is damaged."""
        return self.log.read()

    def some_commits(self, shard_ids: Iterable[str]) -> Mapping[str, CommitRecord]:
        """Return the records of some shards by id; raises the errors of `commit`."""
        return self.log.some(shard_ids)

    def commit(self, shard_id: str) -> CommitRecord:
        """Return one commit record; ShardMissingError if there is none, CorruptError if damaged."""
        return self.log.find(shard_id)

    def shard_ids(self) -> Sequence[str]:
        """Return the ids of all shards that have a commit record, sorted."""
        return self.log.ids()

    def held(self, sample_ids: Collection[str]) -> set[str]:
        """Return the given samples that a committed shard holds."""
        return self.commits().held(sample_ids)

    def free_bytes(self) -> int | None:
        """Return the free space of the store's disk, or None if it is not on a disk."""
        return self.root.free_bytes()

    # ---- planning

    def plan(self, samples: Iterable[PlannedSample], *, shard_tokens: int) -> Plan:
        """Plan every sample that the store has no states of; persist and return the plan.

        Memory use grows with those samples, not with all.

        An unfinished plan for exactly these samples is returned as it was persisted, so that an
        interrupted generation ends in the same shards as an uninterrupted one.
        """
        commits = self.commits()
        plans = self.plans.all()
        unfinished = [shard for plan in plans for shard in plan.shards]
        fresh = plan_shards(
            commits.lacks(samples),
            shard_tokens=shard_tokens,
            pending=[shard for shard in unfinished if shard.shard_id not in commits],
        )
        for plan in plans if fresh.shards else ():
            missing = [shard for shard in plan.shards if shard.shard_id not in commits]
            if missing == list(fresh.shards):
                return plan
        self.plans.save(fresh)
        return fresh

    # ---- writing

    def write_shard(
        self,
        shard: PlannedShard,
        samples: Iterable[StoredSample],
        *,
        probe: Sequence[ProbePoint] | None = None,
        recompute: Recompute | None = None,
    ) -> CommitRecord:
        """Write a shard and commit it; if it is validly committed already, return that record.

        `samples` may come in any order and is consumed only if the shard has to be written; `probe`
        is read after that. The stored bytes are read back before the shard is committed and, with
        `recompute`, must reproduce the probe. A kill or a failure in between leaves no shard.
        Several processes, on any machines, may write the same shard at the same time.

        Raises:
            ShardCorruptError: the stored bytes differ from those written, or do not reproduce the
                probe.

        """
        return self._writer.write(shard, samples, () if probe is None else probe, recompute)

    def revoke(self, shard_id: str) -> None:
        """Revoke a shard's commit record: it counts as missing until it is written again."""
        self.log.revoke(shard_id)

    # ---- snapshots

    def publish(
        self,
        sample_ids: Collection[str],
        *,
        commits: Commits | None = None,
        name: str | None = None,
        made_from: str = "",
        as_latest: bool = True,
    ) -> Snapshot:
        """Publish the snapshot of these samples; ConfigError if one is missing.

        Pass `commits`, if available, to avoid reading all records again. `name` is a split of a
        data set and refers to this snapshot from now on; `made_from` is its origin, for the caller.
        Without `as_latest`, the latest snapshot remains the latest.
        """
        commits = self.commits() if commits is None else commits
        snapshot = Snapshot.of(sample_ids, commits)
        snapshot_id = snapshot.snapshot_id
        is_new = not self._has(snapshot)
        if is_new:
            self.root.publish(keys.snapshot(snapshot_id), snapshot.to_parquet())
        if name is not None:
            self.refs.set(name, snapshot_id, made_from=made_from)
        if as_latest:
            self._name_latest(snapshot_id)
        if is_new:
            self._tidy(snapshot)
        return snapshot

    def _has(self, snapshot: Snapshot) -> bool:
        """Return whether a snapshot exists, in any version: an old store may be read-only."""
        try:
            self.snapshot(snapshot.snapshot_id)
        except (ConfigError, CorruptError):
            return False
        return True

    def _name_latest(self, snapshot_id: str) -> None:
        with suppress(ConfigError, CorruptError):
            if self._latest() == snapshot_id:
                return
        latest = {"format_version": FORMAT_VERSION, "snapshot_id": snapshot_id}
        self.root.publish(keys.LATEST, seal(latest))

    def _tidy(self, snapshot: Snapshot) -> None:
        """Compact records into a manifest, and delete plans that the snapshot has completely.

        A store works without this, so a failure is only a warning.
        """
        try:
            self.compact()
            self.plans.drop_published(snapshot)
        except StorageError as error:
            logger.warning("the snapshot is published, but the store was not tidied up: %s", error)

    def mend_manifests(self) -> None:
        """Restore damaged or missing files of manifests, each from its copy."""
        for manifest in self.log.manifests():
            manifest.mend()

    def compact(self) -> None:
        """Compact records into a manifest if there are many; see `storage.records.compaction`."""
        if not is_worth_compacting(self.log):
            return
        stored = self.root.read(keys.IDENTITY)
        if stored != self.identity.to_json():  # version 2, whose readers do not know manifests
            self.root.publish(keys.IDENTITY, self.identity.to_json())
        compact(self.log)

    def snapshot(self, snapshot_id: str | None = None) -> Snapshot:
        """Return a snapshot, the latest by default; ConfigError if there is none."""
        wanted = snapshot_id or self._latest()
        try:
            data = self.root.read(keys.snapshot(wanted))
        except FileNotFoundError as error:
            known = ", ".join(self.snapshot_ids()) or "none"
            raise ConfigError(
                f"{self.root.url} has no snapshot {wanted}; it has: {known}"
            ) from error
        return Snapshot.from_parquet(data, snapshot_id=wanted)

    def require_present(self, snapshot: Snapshot, *, commits: Commits | None = None) -> None:
        """Raise ShardMissingError unless all objects of a snapshot exist with their sizes.

        Needs one listing, and the commit records unless they are passed in; reads no shard.
        """
        commits = self.commits() if commits is None else commits
        missing = [shard_id for shard_id in snapshot.shard_ids if shard_id not in commits]
        if missing:
            raise ShardMissingError(
                f"{len(missing)} of {len(snapshot.shard_ids)} shards of snapshot "
                f"{snapshot.snapshot_id} have no commit record, first {missing[0]}; {REPAIR}"
            )
        wanted = {shard_id: commits.objects(shard_id) for shard_id in snapshot.shard_ids}
        findings = list(check_presence(self.root, wanted))
        if findings:
            raise ShardMissingError(
                f"{len(findings)} objects of snapshot {snapshot.snapshot_id} differ from what was "
                f"committed, first {findings[0]}"
            )

    def snapshot_ids(self) -> Sequence[str]:
        """Return the ids of all published snapshots, sorted."""
        names = (keys.without(key, keys.PARQUET_SUFFIX) for key in self.root.sizes(keys.SNAPSHOTS))
        return sorted(name for name in names if name is not None)

    def reader(
        self,
        snapshot: Snapshot,
        *,
        cache_bytes: int = CACHE_BYTES,
        object_cache: ObjectCache | None = None,
        shared: SharedShards | None = None,
    ) -> SnapshotReader:
        """Return random access to a snapshot's samples; a remote store needs `object_cache`.

        With `shared`, processes of this machine decode each shard once.
        """
        return SnapshotReader(
            log=self.log,
            identity=self.identity,
            snapshot=snapshot,
            cache_bytes=cache_bytes,
            object_cache=object_cache,
            shared=shared,
        )

    def _latest(self) -> str:
        try:
            data = self.root.read(keys.LATEST)
        except FileNotFoundError as error:
            if self.snapshot_ids():
                raise CorruptError(
                    f"{self.root.where(keys.LATEST)} is missing, but snapshots exist; {PUBLISH}"
                ) from error
            raise ConfigError(
                f"{self.root.url} has no snapshot yet; run a hidden-states flow to the end"
            ) from error
        latest: str = unseal(data, what=keys.LATEST)["snapshot_id"]
        return latest
