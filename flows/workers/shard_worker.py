"""The child process that loads the target once and computes one batch of shards after the other.

Receives one `ShardBatch` after the other and sends `ShardReport`s for each. One shard is written
while the target computes the next, so that neither waits for the other. A kill loses only these
two: only committed shards are visible.
"""

import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from eagle_core.errors import ConfigError, MismatchError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.recompute import TargetRecompute, load_recompute_model
from flows.bridge.semantic_probe import probe_points
from flows.bridge.stored_source import to_stored
from flows.workers.channel import send, serve
from flows.workers.shard_batch import ShardBatch, ShardReport
from storage.records.exclusions import Exclusion
from storage.records.plan import Plan, PlannedShard
from storage.records.probe_point import ProbePoint
from storage.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class _Computed:
    """A computed shard that is not written yet."""

    planned_id: str
    shard: PlannedShard
    states: Sequence[HiddenStateSample]
    probe: Sequence[ProbePoint]
    excluded: tuple[Exclusion, ...]
    began: float


class ShardWorker:
    """The loaded target, and the store that it writes to."""

    def __init__(self, target: TargetConfig, store_root: str) -> None:
        """Load the target for the store at `store_root`."""
        self.made_for = (target, store_root)
        self._store = Store.open(store_root)
        self._target = TargetModel.load(target)
        self._recompute = TargetRecompute(
            self._target.lm_head_weight, load_recompute_model(target, self._store.identity)
        )
        self._plan: Plan | None = None

    def make(self, batch: ShardBatch) -> None:
        """Compute the shards of a batch, and report each."""
        shards = {shard.shard_id: shard for shard in self._planned(batch.plan_id).shards}
        files = [TokenFile(path) for path in batch.token_files]
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
            storing: Future[ShardReport] | None = None
            for shard_id in batch.shard_ids:
                computed = self._compute(shards[shard_id], files)
                _report(storing)
                storing = writer.submit(self._store_shard, computed)
            _report(storing)

    def _compute(self, planned: PlannedShard, files: Sequence[TokenFile]) -> "_Computed":
        """Return the states of a planned shard, without samples whose states cannot be stored."""
        began = time.monotonic()
        omitted = self._store.identity.omitted is not None
        samples = _samples_of(planned, files)
        excluded: list[Exclusion] = []

        def exclude(sample: TokenizedSample, reason: str) -> None:
            send(ShardReport(kind="tokens", tokens=len(sample)))  # it counts as done
            excluded.append(
                Exclusion(sample_id=sample.sample_id, reason=reason, location=sample.location)
            )

        captured = capture_states(self._target, samples, for_recompute=omitted, on_unusable=exclude)
        states = list(_counted(captured))
        shard = planned
        if excluded:
            usable = {state.sample_id for state in states}
            samples = [sample for sample in samples if sample.sample_id in usable]
            shard = PlannedShard.holding(samples)
        probe = probe_points(states, samples, shard_id=shard.shard_id, omitted=omitted)
        return _Computed(
            planned_id=planned.shard_id,
            shard=shard,
            states=states,
            probe=probe,
            excluded=tuple(excluded),
            began=began,
        )

    def _planned(self, plan_id: str) -> Plan:
        if self._plan is None or self._plan.plan_id != plan_id:
            self._plan = self._store.plans.load(plan_id)
        return self._plan

    def _store_shard(self, computed: "_Computed") -> ShardReport:
        """Write a shard and read it back, in a thread: the target computes the next one."""
        shard = computed.shard
        if shard.sample_ids:
            if computed.excluded:
                self._store.plans.save(Plan.of([shard]))  # else gc would take it
            self._store.write_shard(
                shard,
                map(to_stored, computed.states),
                probe=computed.probe,
                recompute=self._recompute,
            )
        return ShardReport(
            kind="shard",
            planned_id=computed.planned_id,
            shard_id=shard.shard_id if shard.sample_ids else "",
            excluded=computed.excluded,
            seconds=time.monotonic() - computed.began,
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )


class _Server:
    """Keeps the target loaded between batches."""

    def __init__(self) -> None:
        self._worker: ShardWorker | None = None

    def make(self, batch: ShardBatch) -> None:
        """Compute the shards of a batch."""
        if self._worker is None or self._worker.made_for != (batch.target, batch.store_root):
            self._worker = None  # before the next target is loaded
        try:
            self._worker = self._worker or ShardWorker(batch.target, batch.store_root)
            self._worker.make(batch)
        except torch.OutOfMemoryError as error:
            self._worker = None
            raise ConfigError(
                f"{error}; lower target.batch_tokens ({batch.target.batch_tokens:,}), or use a GPU "
                "with more memory"
            ) from error


def _report(storing: Future[ShardReport] | None) -> None:
    if storing is not None:
        send(storing.result())


def _samples_of(shard: PlannedShard, files: Sequence[TokenFile]) -> list[TokenizedSample]:
    """Return a shard's samples; one that both splits have is returned once."""
    samples: list[TokenizedSample] = []
    missing = list(shard.sample_ids)
    for file in files:
        samples += file.by_id([name for name in missing if name in file])
        missing = [name for name in missing if name not in file]
    if missing:
        raise MismatchError(
            f"shard {shard.shard_id} needs {len(shard.sample_ids)} samples, but {len(missing)} of "
            f"them are in no token file, first {missing[0]}; run the hidden-states flow again, "
            "which makes a new plan"
        )
    return samples


def _counted(samples: Iterable[HiddenStateSample]) -> Iterator[HiddenStateSample]:
    for sample in samples:
        send(ShardReport(kind="tokens", tokens=len(sample)))
        yield sample


if __name__ == "__main__":
    sys.exit(serve(ShardBatch, _Server().make))
