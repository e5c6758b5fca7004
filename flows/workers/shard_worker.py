"""The child process that loads the target once and computes one batch of shards after the other.

Receives one `ShardBatch` after the other and sends `ShardReport`s for each. One shard is written
while the target computes the next, so that neither waits for the other. A kill loses only these
two: only committed shards are visible.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from eagle_core.errors import ConfigError, MismatchError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import capture_groups
from eagle_core.target.config import TargetConfig
from eagle_core.target.placement import load_target
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

Sample = TypeVar("Sample", TokenizedSample, HiddenStateSample)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Computed:
    """A computed shard that is not written yet."""

    planned_id: str
    shard: PlannedShard
    states: Sequence[HiddenStateSample]
    probe: Sequence[ProbePoint]
    excluded: tuple[Exclusion, ...]
    began: float


class _Progress:
    """Reports tokens as done once, whether a layer or the whole target is done with them."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, num_tokens: int) -> None:
        """Begin a batch of shards with `num_tokens`."""
        self._total = num_tokens
        self._reported = self._captured = 0

    def passed_layer(self, num_tokens: int) -> None:
        """Report the share of a streamed pass that is done, padding included."""
        self._report(min(self._reported + num_tokens, self._total))

    def has(self, sample: Sample) -> Sample:
        """Report a sample whose states are there, and return it."""
        self._captured += len(sample)
        self._report(max(self._reported, self._captured))
        return sample

    def _report(self, done: int) -> None:
        more, self._reported = done - self._reported, done
        send(ShardReport(kind="tokens", tokens=more))  # even of none: the process is alive


class ShardWorker:
    """The loaded target, and the store that it writes to."""

    def __init__(self, batch: ShardBatch) -> None:
        """Load the target for the store of `batch`."""
        self.made_for = _what_for(batch)
        self._store = Store.open(batch.store_root)
        self._progress = _Progress()
        # First, for the target's placement goes by what is free.
        recompute_model = load_recompute_model(batch.target, self._store.identity)
        self._target = load_target(
            batch.target,
            share=batch.memory,
            on_tokens=self._progress.passed_layer,
        )
        self._recompute = TargetRecompute(self._target.lm_head_weight, recompute_model)
        self._plan: Plan | None = None

    def make(self, batch: ShardBatch) -> None:
        """Compute the shards of a batch, and report each."""
        shards = {shard.shard_id: shard for shard in self._planned(batch.plan_id).shards}
        files = [TokenFile(path) for path in batch.token_files]
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
            storing: Future[ShardReport] | None = None
            for computed in self._compute([shards[name] for name in batch.shard_ids], files):
                _report(storing)
                storing = writer.submit(self._store_shard, computed)
            _report(storing)

    def _compute(
        self, planned: Sequence[PlannedShard], files: Sequence[TokenFile]
    ) -> Iterator["_Computed"]:
        """Yield the states of planned shards, without samples whose states cannot be stored."""
        began = time.monotonic()
        omitted = self._store.identity.omitted is not None
        samples = [_samples_of(shard, files) for shard in planned]
        self._progress.begin(sum(len(sample) for shard in samples for sample in shard))
        excluded: list[Exclusion] = []

        def exclude(sample: TokenizedSample, reason: str) -> None:
            self._progress.has(sample)  # it counts as done
            excluded.append(
                Exclusion(sample_id=sample.sample_id, reason=reason, location=sample.location)
            )

        groups = capture_groups(self._target, samples, for_recompute=omitted, on_unusable=exclude)
        for whole, given, captured in zip(planned, samples, groups, strict=True):
            states = list(map(self._progress.has, captured))
            usable, shard = given, whole
            if excluded:
                ids = {state.sample_id for state in states}
                usable = [sample for sample in given if sample.sample_id in ids]
                shard = PlannedShard.holding(usable)
            probe = probe_points(states, usable, shard_id=shard.shard_id, omitted=omitted)
            yield _Computed(
                planned_id=whole.shard_id,
                shard=shard,
                states=states,
                probe=probe,
                excluded=tuple(excluded),
                began=began,
            )
            began = time.monotonic()
            excluded.clear()

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
        if self._worker is None or self._worker.made_for != _what_for(batch):
            self._worker = None  # before the next target is loaded
        try:
            self._worker = self._worker or ShardWorker(batch)
            self._worker.make(batch)
        except torch.OutOfMemoryError as error:
            self._worker = None
            raise ConfigError(
                f"{error}; lower target.batch_tokens ({batch.target.batch_tokens:,}) or, if the "
                "target is streamed, target.stream_tokens; or use a GPU with more memory"
            ) from error


def _what_for(batch: ShardBatch) -> tuple[TargetConfig, str]:
    return batch.target, batch.store_root


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


if __name__ == "__main__":
    sys.exit(serve(ShardBatch, _Server().make))
