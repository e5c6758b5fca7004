"""Fills shards with samples one at a time; a full one is written while the next one is filled."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from eagle_core.samples import HiddenStateSample, TokenizedSample
from flows.bridge.import_journal import ImportJournal, Note
from flows.bridge.recompute import TargetRecompute
from flows.bridge.semantic_probe import probe_points
from flows.bridge.stored_source import to_stored
from storage.records.plan import Plan, PlannedShard
from storage.store import Store

_SHARDS_PER_PLAN = 64


class ShardFiller:
    """Context manager: writes the last shard at the end of a block without an error."""

    def __init__(
        self, store: Store, journal: ImportJournal, recompute: TargetRecompute, *, shard_tokens: int
    ) -> None:
        """Write to `store`, up to `shard_tokens` a shard; `recompute` checks what was written."""
        self._store, self._journal, self._recompute = store, journal, recompute
        self._shard_tokens = shard_tokens
        self._states: list[HiddenStateSample] = []
        self._tokens: list[TokenizedSample] = []
        self._notes: list[Note] = []
        self._plan = Plan.of(())
        self._writing: Future[None] | None = None
        self.num_shards = 0

    def __enter__(self) -> Self:
        """Start the writing thread."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="import-writer")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the last shard, unless an error ended the block, and wait."""
        try:
            if kind is None:
                self._write()
                self._wait()
        finally:
            self._writer.shutdown(wait=True)

    def add(self, states: HiddenStateSample, *, note: Note) -> None:
        """Add a sample, and what is to be remembered of its row."""
        held = sum(len(sample) for sample in self._states)
        if held and held + len(states) > self._shard_tokens:
            self._write()
        self._states.append(states)
        self._notes.append(note)
        self._tokens.append(
            TokenizedSample(
                sample_id=states.sample_id,
                input_ids=states.input_ids,
                loss_mask=states.loss_mask,
                location=note.location,
            )
        )

    def _write(self) -> None:
        """Hand the samples so far to the thread; one shard is in it at a time."""
        self._wait()
        states, tokens, notes = self._states, self._tokens, self._notes
        self._states, self._tokens, self._notes = [], [], []
        if states:
            self._writing = self._writer.submit(self._commit, states, tokens, notes)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _commit(
        self,
        states: Sequence[HiddenStateSample],
        tokens: Sequence[TokenizedSample],
        notes: Sequence[Note],
    ) -> None:
        self._journal.write(tokens, notes)
        ids = {one.sample_id for one in states}
        ids -= self._journal.held_before(ids)
        fresh = [one for one in states if one.sample_id in ids]
        if not fresh:
            return
        shard = PlannedShard.holding(fresh)
        samples = [one for one in tokens if one.sample_id in ids]
        self._keep_from_collection(shard)
        probe = probe_points(fresh, samples, shard_id=shard.shard_id, omitted=False)
        self._store.write_shard(
            shard, map(to_stored, fresh), probe=probe, recompute=self._recompute
        )
        self.num_shards += 1

    def _keep_from_collection(self, shard: PlannedShard) -> None:
        """Plan a shard before it is written: gc takes what neither a plan nor a snapshot has."""
        before, shards = self._plan, self._plan.shards
        is_full = len(shards) == _SHARDS_PER_PLAN
        self._plan = Plan.of([shard] if is_full else [*shards, shard])
        self._store.plans.save(self._plan)
        if shards and not is_full:
            self._store.plans.delete(before.plan_id)
