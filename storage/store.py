"""A store: shards that exist only if their commit record does, and snapshots that list samples.

Layout and write order are in `docs/store-format.md`. The store is the only truth about what exists:
whatever was interrupted, running the same thing again ends in the same bytes.
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
        """Make a store, or open the one that is there; MismatchError if it holds other states."""
        directory = ObjectStore.at(root)
        directory.create(keys.IDENTITY, identity.to_json())
        store = cls.open(root)
        store.identity.require_equal(identity, where=f"the store at {directory.url}")
        return store

    @classmethod
    def open(cls, root: str) -> "Store":
        """Open the store at a local path or fsspec URL; ConfigError if there is none."""
        directory = ObjectStore.at(root)
        try:
            data = directory.read(keys.IDENTITY)
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no store at {directory.url} (no {keys.IDENTITY}); run a hidden-states "
                "flow to make one, or correct the path"
            ) from error
        return cls(directory, StoreIdentity.from_json(data))

    @property
    def is_local(self) -> bool:
        """Tell whether the store lies on a disk of this machine."""
        return self.root.is_local

    # ---- what exists

    def commits(self) -> Commits:
        """Return all that is committed; CorruptError if a record or a manifest is damaged."""
        return self.log.read()

    def some_commits(self, shard_ids: Iterable[str]) -> Mapping[str, CommitRecord]:
        """Return the records of some shards by id; raises what `commit` does."""
        return self.log.some(shard_ids)

    def commit(self, shard_id: str) -> CommitRecord:
        """Return one commit record; ShardMissingError if there is none, CorruptError if damaged."""
        return self.log.find(shard_id)

    def shard_ids(self) -> Sequence[str]:
        """Return the ids of all shards that have a commit record, sorted."""
        return self.log.ids()

    def held(self, sample_ids: Collection[str]) -> set[str]:
        """Return those of some samples that a committed shard holds."""
        return self.commits().held(sample_ids)

    def free_bytes(self) -> int | None:
        """Return the free space where the store lies, or None where that has no meaning."""
        return self.root.free_bytes()

    # ---- what is to be made

    def plan(self, samples: Iterable[PlannedSample], *, shard_tokens: int) -> Plan:
        """Return, persisted, the plan that makes every sample of which the store has no states.

        Memory is taken for those samples, not for all.

        An unfinished plan that makes exactly these is returned as it was persisted, so that an
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
        """Write a shard and commit it; return the record of one that is validly committed already.

        `samples` may come in any order and is consumed only if the shard has to be written; `probe`
        is read after that. The stored bytes are read back before the shard is committed and, with
        `recompute`, must say what the probe holds: a kill in between leaves no shard. Neither does
        a failure. Several may write the same shard at the same time, on any machines.

        Raises:
            ShardCorruptError: the stored bytes are not those written, or do not say what the target
                said.

        """
        return self._writer.write(shard, samples, () if probe is None else probe, recompute)

    def revoke(self, shard_id: str) -> None:
        """Take back a shard's commit record: it counts as missing until it is written again."""
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

        `commits` spares reading all records again, if the caller has them. `name` is that of a
        split of a data set and means this snapshot from now on, `made_from` what the caller knows.
        Not `as_latest`, it is one more beside the latest.
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
        """Tell whether a snapshot is there, of whatever version: such a store may be read-only."""
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
        """Put many records into a manifest, and drop plans of which everything is published there.

        A store works without, so what goes wrong is a warning.
        """
        try:
            self.compact()
            self.plans.drop_published(snapshot)
        except StorageError as error:
            logger.warning("the snapshot is published; the store was not tidied up: %s", error)

    def mend_manifests(self) -> None:
        """Write damaged or lost files of manifests again, each from its copy."""
        for manifest in self.log.manifests():
            manifest.mend()

    def compact(self) -> None:
        """Put records into a manifest if there are many; see `storage.records.compaction`."""
        if not is_worth_compacting(self.log):
            return
        key = self.root.read(keys.IDENTITY)
        if key != self.identity.to_json():  # of version 2, whose readers know no manifests
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
        """Raise ShardMissingError unless all objects of a snapshot are there with their sizes.

        Takes one listing and the commit records, if the caller has none; no shard is read.
        """
        commits = self.commits() if commits is None else commits
        lost = [shard_id for shard_id in snapshot.shard_ids if shard_id not in commits]
        if lost:
            raise ShardMissingError(
                f"{len(lost)} of {len(snapshot.shard_ids)} shards of snapshot "
                f"{snapshot.snapshot_id} have no commit record, first {lost[0]}; {REPAIR}"
            )
        wanted = {shard_id: commits.objects(shard_id) for shard_id in snapshot.shard_ids}
        findings = list(check_presence(self.root, wanted))
        if findings:
            raise ShardMissingError(
                f"{len(findings)} objects of snapshot {snapshot.snapshot_id} are not what was "
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
    ) -> SnapshotReader:
        """Return random access to the samples of a snapshot; a remote store wants a cache."""
        return SnapshotReader(
            log=self.log,
            identity=self.identity,
            snapshot=snapshot,
            cache_bytes=cache_bytes,
            object_cache=object_cache,
        )

    def _latest(self) -> str:
        try:
            data = self.root.read(keys.LATEST)
        except FileNotFoundError as error:
            if self.snapshot_ids():
                raise CorruptError(
                    f"{self.root.where(keys.LATEST)} is missing, but there are snapshots; {PUBLISH}"
                ) from error
            raise ConfigError(
                f"{self.root.url} has no snapshot yet; run a hidden-states flow to the end"
            ) from error
        latest: str = unseal(data, what=keys.LATEST)["snapshot_id"]
        return latest
