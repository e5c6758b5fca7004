"""The plans of a store, kept until all their samples are published."""

import time
from collections.abc import Sequence

from storage.errors import ConfigError
from storage.objects.object_store import ObjectStore
from storage.records import keys
from storage.records.commit_log import CommitLog
from storage.records.plan import Plan, PlannedShard
from storage.records.snapshot import Snapshot

MIN_AGE_SECONDS = 24 * 3600.0
"""A younger plan may be in use although all of it is published, for example by a repair."""


class Plans:
    """The persisted plans of one store."""

    def __init__(self, root: ObjectStore, log: CommitLog) -> None:
        """Read and write below the root of a store."""
        self._root = root
        self._log = log

    def all(self) -> Sequence[Plan]:
        """Return every persisted plan, by plan id."""
        names = (keys.without(key, keys.JSON_SUFFIX) for key in self._root.sizes(keys.PLANS))
        return [self.load(name) for name in sorted(name for name in names if name is not None)]

    def load(self, plan_id: str) -> Plan:
        """Return a persisted plan.

        Raises:
            ConfigError: there is none with this id.
            CorruptError: it is damaged.

        """
        try:
            data = self._root.read(keys.plan(plan_id))
        except FileNotFoundError as error:
            raise ConfigError(f"{self._root.url} has no plan {plan_id}") from error
        return Plan.from_json(data, plan_id=plan_id)

    def save(self, plan: Plan) -> None:
        """Persist a plan; one without shards is not written."""
        if plan.shards:
            self._root.publish(keys.plan(plan.plan_id), plan.to_json())

    def delete(self, plan_id: str) -> None:
        """Remove a plan; its shards stay."""
        self._root.delete(keys.plan(plan_id))

    def missing(self, plan: Plan) -> tuple[PlannedShard, ...]:
        """Return the shards of a plan that are not committed, in its order."""
        committed = set(self._log.ids())
        return tuple(shard for shard in plan.shards if shard.shard_id not in committed)

    def unfinished(self) -> Sequence[tuple[Plan, Sequence[PlannedShard]]]:
        """Return the plans with samples still to be generated, and the shards that hold these.

        All samples of an uncommitted shard may be in other shards, or excluded.
        """
        committed = set(self._log.ids())
        uncommitted = [
            (plan, [shard for shard in plan.shards if shard.shard_id not in committed])
            for plan in self.all()
        ]
        names = [name for _, shards in uncommitted for shard in shards for name in shard.sample_ids]
        if not names:
            return []
        commits, _ = self._log.read_what_is_sound()
        missing = set(commits.usable(names)) - commits.held(names)
        still = (
            (plan, [shard for shard in shards if not missing.isdisjoint(shard.sample_ids)])
            for plan, shards in uncommitted
        )
        return [(plan, shards) for plan, shards in still if shards]

    def drop_published(self, snapshot: Snapshot) -> None:
        """Remove the old plans that a snapshot has completely, in compacted records."""
        limit = time.time() - MIN_AGE_SECONDS
        written = self._root.entries(keys.PLANS)
        old = {key for key, entry in written.items() if entry.modified < limit}
        needed = self._log.compacted().intersection(snapshot.shard_ids) if old else frozenset()
        if not needed:
            return
        committed, excluded = set(self._log.ids()), self._log.exclusions.sample_ids()
        for plan in self.all():
            others = [shard for shard in plan.shards if shard.shard_id not in needed]
            elsewhere = {name for shard in others for name in shard.sample_ids} - excluded
            if (
                f"{plan.plan_id}{keys.JSON_SUFFIX}" in old
                and committed.isdisjoint(shard.shard_id for shard in others)
                # In shards made without an excluded sample, or after its exclusion.
                and snapshot.has_all(elsewhere)
            ):
                self.delete(plan.plan_id)
