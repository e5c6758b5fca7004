"""A store: shards that exist only if their commit record does, and snapshots that list samples.

Layout and write order are in `docs/store-format.md`. The store is the only truth about what exists:
whatever was interrupted, running the same thing again ends in the same bytes.
"""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from storage.errors import ConfigError, CorruptError, ShardMissingError, StorageError
from storage.maintenance.verify import scrub
from storage.objects.object_cache import ObjectCache
from storage.objects.object_store import TEMPORARY_SUFFIX, Directory
from storage.objects.sealed_json import seal, unseal
from storage.probe import ProbePoint
from storage.reader import CACHE_BYTES, SnapshotReader
from storage.recompute import Recompute
from storage.records.commit_log import CommitLog
from storage.records.commit_record import CommitRecord
from storage.records.commits import Commits
from storage.records.compaction import compact, is_worth_compacting
from storage.records.identity import FORMAT_VERSION, StoreIdentity
from storage.records.plan import Plan, PlannedSample, PlannedShard, plan_shards
from storage.records.presence import PUBLISH, REPAIR, Finding, check_presence, check_states
from storage.records.refs import Refs
from storage.records.snapshot import Snapshot
from storage.samples import StoredSample
from storage.writer import ShardWriter

logger = logging.getLogger(__name__)

IDENTITY_KEY = "store.json"
LATEST_KEY = "snapshots/latest.json"
PLAN_SECONDS = 24 * 3600.0
"""A plan that is younger may be at work, though all of it is published: a repair's, for one."""


class Store:
    """The hidden-state store at one root."""

    def __init__(self, root: Directory, identity: StoreIdentity) -> None:
        """Use `Store.create` or `Store.open` instead."""
        self.identity = identity
        self.root = root
        self.refs = Refs(root)
        self.log = CommitLog(root, identity.identity_id)
        self.exclusions = self.log.exclusions
        self._writer = ShardWriter(root=root, identity=identity, log=self.log)

    @classmethod
    def create(cls, root: str, identity: StoreIdentity) -> "Store":
        """Make a store, or open the one that is there; MismatchError if it holds other states."""
        directory = Directory.at(root)
        directory.create(IDENTITY_KEY, identity.to_json())
        store = cls.open(root)
        store.identity.require_equal(identity, where=f"the store at {directory.url}")
        return store

    @classmethod
    def open(cls, root: str) -> "Store":
        """Open the store at a local path or fsspec URL; ConfigError if there is none."""
        directory = Directory.at(root)
        try:
            data = directory.read(IDENTITY_KEY)
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no store at {directory.url} (no {IDENTITY_KEY}); run a hidden-states "
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
        plans = self.plans()
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
        self.save_plan(fresh)
        return fresh

    def plans(self) -> Sequence[Plan]:
        """Return every persisted plan, by plan id."""
        return [self.load_plan(plan_id) for plan_id in self._listed("plans", ".json")]

    def pending_plan(self) -> Plan | None:
        """Return a persisted plan with shards that are to be made, or None."""
        return next((plan for plan, _ in self.unfinished()), None)

    def unfinished(self) -> Sequence[tuple[Plan, Sequence[PlannedShard]]]:
        """Return the plans with samples that are to be made, and in which of their shards.

        All samples of a shard that is not committed may be in others, or left out.
        """
        committed = set(self.shard_ids())
        uncommitted = [
            (plan, [shard for shard in plan.shards if shard.shard_id not in committed])
            for plan in self.plans()
        ]
        names = [name for _, shards in uncommitted for shard in shards for name in shard.sample_ids]
        if not names:
            return []
        commits, _ = self.log.read_what_is_sound()
        missing = set(commits.usable(names)) - commits.held(names)
        still = (
            (plan, [shard for shard in shards if not missing.isdisjoint(shard.sample_ids)])
            for plan, shards in uncommitted
        )
        return [(plan, shards) for plan, shards in still if shards]

    def missing_shards(self, plan: Plan) -> tuple[PlannedShard, ...]:
        """Return the shards of a plan that are not committed, in its order."""
        committed = set(self.shard_ids())
        return tuple(shard for shard in plan.shards if shard.shard_id not in committed)

    def save_plan(self, plan: Plan) -> None:
        """Persist a plan; one without shards leaves nothing behind."""
        if plan.shards:
            self.root.publish(f"plans/{plan.plan_id}.json", plan.to_json())

    def load_plan(self, plan_id: str) -> Plan:
        """Return a persisted plan; ConfigError if there is none with this id."""
        try:
            data = self.root.read(f"plans/{plan_id}.json")
        except FileNotFoundError as error:
            raise ConfigError(f"{self.root.url} has no plan {plan_id}") from error
        return Plan.from_json(data, plan_id=plan_id)

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
            self.root.publish(f"snapshots/{snapshot_id}.parquet", snapshot.to_parquet())
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
        self.root.publish(LATEST_KEY, seal(latest))

    def _tidy(self, snapshot: Snapshot) -> None:
        """Put many records into a manifest, and drop plans of which everything is published there.

        A store works without, so what goes wrong is a warning.
        """
        try:
            self.compact()
            limit = time.time() - PLAN_SECONDS
            written = self.root.entries("plans")
            old = [key for key, entry in written.items() if entry.modified < limit]
            needed = self.log.compacted().intersection(snapshot.shard_ids) if old else frozenset()
            if not needed:
                return
            committed, excluded = set(self.shard_ids()), self.exclusions.sample_ids()
            for plan in self.plans():
                key = f"{plan.plan_id}.json"
                others = [shard for shard in plan.shards if shard.shard_id not in needed]
                elsewhere = {name for shard in others for name in shard.sample_ids} - excluded
                if (
                    key in old
                    and committed.isdisjoint(shard.shard_id for shard in others)
                    and snapshot.has_all(elsewhere)  # in shards made without a sample, or after it
                ):
                    self.root.delete(f"plans/{key}")
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
        key = self.root.read(IDENTITY_KEY)
        if key != self.identity.to_json():  # of version 2, whose readers know no manifests
            self.root.publish(IDENTITY_KEY, self.identity.to_json())
        compact(self.log)

    def snapshot(self, snapshot_id: str | None = None) -> Snapshot:
        """Return a snapshot, the latest by default; ConfigError if there is none."""
        wanted = snapshot_id or self._latest()
        try:
            data = self.root.read(f"snapshots/{wanted}.parquet")
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
        return self._listed("snapshots", ".parquet")

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
            data = self.root.read(LATEST_KEY)
        except FileNotFoundError as error:
            if self.snapshot_ids():
                raise CorruptError(
                    f"{self.root.where(LATEST_KEY)} is missing, but there are snapshots; {PUBLISH}"
                ) from error
            raise ConfigError(
                f"{self.root.url} has no snapshot yet; run a hidden-states flow to the end"
            ) from error
        latest: str = unseal(data, what=LATEST_KEY)["snapshot_id"]
        return latest

    # ---- verification

    def verify(self, *, deep: bool, recompute: Recompute | None = None) -> Sequence[Finding]:
        """Return all damage: sizes of every committed object, or with `deep` every byte.

        With `recompute`, the states of every healthy shard must also reproduce its semantic probe.
        """
        return scrub(self, deep=deep, recompute=recompute)

    def verify_shard(
        self, shard_id: str, *, recompute: Recompute, exact: bool = False
    ) -> Sequence[Finding]:
        """Return the damage of one shard, every byte and its semantic probe.

        With `exact`, states that are left out must be made again bit for bit, not only closely.
        """
        record = self.commit(shard_id)
        return list(check_states(self.root, record, self.identity, recompute, exact=exact))

    def shard_ids(self) -> Sequence[str]:
        """Return the ids of all shards that have a commit record, sorted."""
        return self.log.ids()

    def _listed(self, prefix: str, suffix: str) -> Sequence[str]:
        """Return the sorted names, less `suffix`, of the objects in a flat directory."""
        keys = self.root.sizes(prefix)
        return sorted(
            key.removesuffix(suffix)
            for key in keys
            if key.endswith(suffix) and not key.endswith(TEMPORARY_SUFFIX)
        )
