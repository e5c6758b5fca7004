"""Stores the states of online training: every group becomes a shard, which later fetches read.

A shard equals the one that `hidden-states` would write for the same samples, including the semantic
probe, and is read back before it counts. Stored states are never computed again.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from flows.bridge.recompute import TargetRecompute
from flows.bridge.semantic_probe import probe_points
from flows.bridge.stored_source import StoredSource, to_stored
from storage.records.plan import Plan, PlannedSample, PlannedShard
from storage.records.probe_point import ProbePoint
from storage.records.snapshot import Snapshot
from storage.store import Store

Capture = Callable[[Sequence[TokenizedSample]], Iterable[HiddenStateSample]]


class StateKeeper:
    """The states of a set of samples, which are added to a store one group at a time."""

    def __init__(
        self,
        store: Store,
        sample_ids: Sequence[str],
        recompute: TargetRecompute,
        recompute_model: RecomputeModel | None,
        *,
        shards_in_memory: int,
    ) -> None:
        """Read which samples the store holds; nothing is written yet.

        Args:
            store: receives the states.
            sample_ids: the samples to store.
            recompute: checks the written shards.
            recompute_model: of `flows.bridge.recompute.load_recompute_model` for the store.
            shards_in_memory: decoded shards to keep in memory, those of a shuffle window.

        """
        self.store = store
        self._wanted = frozenset(sample_ids)
        self._recompute, self._recompute_model = recompute, recompute_model
        self._shards_in_memory = shards_in_memory
        self._held = store.held(self._wanted)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state-keeper")
        self._writing: Future[None] | None = None
        self._written: frozenset[str] = frozenset()
        """Samples of the newest write."""
        self._source: StoredSource | None = None
        self._index: dict[str, int] = {}

    @property
    def num_missing(self) -> int:
        """Return how many of the wanted samples have no stored states yet."""
        return len(self._wanted) - len(self._held)

    def plan(self, groups: Iterable[Sequence[PlannedSample]]) -> None:
        """Save the planned shards, so that garbage collection keeps them."""
        missing = [
            [sample for sample in group if not self.holds(sample.sample_id)] for group in groups
        ]
        self.store.plans.save(Plan.of(PlannedShard.of(members) for members in missing if members))

    def holds(self, sample_id: str) -> bool:
        """Return whether the store has a sample; wait while it is being written."""
        if sample_id in self._written:
            self._finish_writing()
        return sample_id in self._held

    def fetch(self, sample_id: str) -> HiddenStateSample:
        """Return a sample that the store holds."""
        if sample_id not in self._index:
            self._open()
        assert self._source is not None  # noqa: S101 (just opened)
        return self._source.fetch(self._index[sample_id])

    def prefetch(self, sample_ids: Iterable[str]) -> None:
        """Start reading the shards of these samples, as far as the store is known to hold them."""
        if self._source is not None:
            known = [self._index[name] for name in sample_ids if name in self._index]
            self._source.prefetch(known)

    def compute(
        self, samples: Sequence[TokenizedSample], capture: Capture
    ) -> list[HiddenStateSample]:
        """Return the states of `samples`, in any order; a thread writes them as one shard."""
        shard = PlannedShard.holding(samples)
        states = list(capture(samples))
        omitted = self.store.identity.omitted is not None
        probe = probe_points(states, samples, shard_id=shard.shard_id, omitted=omitted)
        self._finish_writing()
        self._written = frozenset(shard.sample_ids)
        self._writing = self._writer.submit(self._write, shard, states, probe)
        return states

    def publish(self, name: str, *, made_from: str) -> Snapshot | None:
        """Publish the snapshot of all wanted samples by name; None while some are missing."""
        self._finish_writing()
        if self.num_missing:
            return None
        return self.store.publish(self._wanted, name=name, made_from=made_from)

    def __enter__(self) -> Self:
        """Return the keeper."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the shard that is being written."""
        self._writer.shutdown(wait=True)

    def _write(
        self, shard: PlannedShard, states: Sequence[HiddenStateSample], probe: Sequence[ProbePoint]
    ) -> None:
        self.store.write_shard(
            shard, map(to_stored, states), probe=probe, recompute=self._recompute
        )

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
            self._held |= self._written

    def _open(self) -> None:
        """Open all samples now in the store: once at the start, once for the second epoch."""
        commits = self.store.commits()
        snapshot = Snapshot.of(self._held, commits)
        largest = commits.totals.largest_raw_bytes
        reader = self.store.reader(snapshot, cache_bytes=self._shards_in_memory * largest)
        self._source = StoredSource(reader, self._recompute_model)
        self._index = {snapshot.sample_id(row): row for row in range(snapshot.num_samples)}
