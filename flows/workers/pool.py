"""A pool of child processes that compute shards: each stays alive and loads its target once.

Each has a slot, which one batch at a time may use. A child that dies is replaced when its slot is
used the next time.
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_python import VISIBLE_DEVICES
from eagle_core.target.memory.free_memory import ALONE, MemoryShare, free_main_memory
from eagle_core.target.model_config import resolve_device
from flows.config.runner import RunnerConfig
from flows.errors import ChildKilledError, RunStoppedError
from flows.workers.child_process import Child
from flows.workers.shard_batch import ShardBatch, ShardReport

IDLE_SECONDS = 60.0
"""A cluster's worker keeps its child for this long after a batch: another run may need the GPU."""


class WorkerPool:
    """Children that compute shards, one for each slot; a batch waits until a slot is free."""

    def __init__(
        self,
        slots: Sequence[Mapping[str, str]],
        *,
        idle_seconds: float | None = None,
        on_report: Callable[[ShardReport], None] = lambda _report: None,
    ) -> None:
        """Create one slot per environment.

        Args:
            slots: per child, the variables added to this process's environment.
            idle_seconds: a child is ended after this long without a batch; None keeps it.
            on_report: called with every report of every child.

        """
        self._slots = list(slots)
        self._children: list[Child | None] = [None] * len(self._slots)
        self._timers: list[threading.Timer | None] = [None] * len(self._slots)
        self._idle_seconds = idle_seconds
        self.on_report = on_report
        self._free: SimpleQueue[int] = SimpleQueue()
        self._lock = threading.Lock()
        self._outdated: set[int] = set()
        self._is_closed = False
        for slot in range(len(self._slots)):
            self._free.put(slot)

    def make(self, batch: ShardBatch) -> Iterator[ShardReport]:
        """Yield what a child reports while it computes the shards of `batch`.

        Raises:
            ChildKilledError: the child died without a result, or hung and was killed.
            EagleCoreError, StorageError: the error that it reported.
            RunStoppedError: `close` was called.

        """
        what = f"the process of shards {batch.first}-{batch.last}"
        try:
            with self._child() as child:
                lines = child.request(
                    batch, what=what, inactivity_timeout_seconds=batch.inactivity_timeout_seconds
                )
                for line in lines:
                    report = ShardReport.model_validate_json(line)
                    self.on_report(report)
                    yield report
        except ChildKilledError as error:
            if self._is_closed:  # must not be retried
                raise RunStoppedError(f"{what} was ended, because the run has ended") from error
            raise

    @contextmanager
    def _child(self) -> Iterator[Child]:
        slot = self._free.get()
        try:
            with self._lock:
                if self._is_closed:
                    raise RunStoppedError("the run has ended")
                self._stop_timer(slot)
                if slot in self._outdated:
                    self._end(slot)
                child = self._children[slot]
                if child is None:
                    child = Child("flows.workers.shard_worker", environment=self._slots[slot])
                    self._children[slot] = child
            yield child
        finally:
            with self._lock:
                self._release(slot)
            self._free.put(slot)

    def renew(self) -> None:
        """Start children anew, each before its next batch: they keep their environment."""
        with self._lock:
            self._outdated = {slot for slot, child in enumerate(self._children) if child}

    def close(self) -> None:
        """End all children, even busy ones, and start no other."""
        with self._lock:
            self._is_closed = True
            for slot in range(len(self._slots)):
                self._stop_timer(slot)
                self._end(slot)

    def _release(self, slot: int) -> None:
        child = self._children[slot]
        if child is not None and not child.is_idle:
            self._end(slot)
        elif self._idle_seconds is not None:
            timer = threading.Timer(self._idle_seconds, self._end_idle, (slot,))
            timer.daemon = True
            self._timers[slot] = timer
            timer.start()

    def _end_idle(self, slot: int) -> None:
        with self._lock:
            if self._timers[slot] is threading.current_thread():  # the slot is still unused
                self._end(slot)

    def _stop_timer(self, slot: int) -> None:
        timer, self._timers[slot] = self._timers[slot], None
        if timer is not None:
            timer.cancel()

    def _end(self, slot: int) -> None:
        child, self._children[slot] = self._children[slot], None
        self._outdated.discard(slot)
        if child is not None:
            child.close()


def local_slots(target: TargetConfig, num_workers: int) -> Sequence[Mapping[str, str]]:
    """Return the variables added for each child on this machine: each gets its own GPU.

    With tensor parallelism, each gets that many. With fewer GPUs than children, they share GPUs in
    turn. One child sees all GPUs of this process.

    Raises:
        ConfigError: too few GPUs for that many children with tensor parallelism.

    """
    if num_workers == 1 or resolve_device(target.device).type != "cuda":
        return [{}] * num_workers
    num_gpus, each = torch.cuda.device_count(), target.tensor_parallel
    if each > 1 and num_gpus < num_workers * each:
        raise ConfigError(
            f"target {target.name}: {num_workers} processes with {each} GPUs each "
            f"(runner.num_workers, target.tensor_parallel) need {num_workers * each}, and there "
            f"are {num_gpus}: lower one of them"
        )
    return gpus_in_turn(os.environ.get(VISIBLE_DEVICES), num_gpus, num_workers, each=each)


def memory_share(target: TargetConfig, runner: RunnerConfig) -> MemoryShare:
    """Return what each process of a runner may take of this machine, before any has begun.

    Of a running cluster nobody knows here which workers share a machine.
    """
    num_workers = runner.num_workers
    if num_workers == 1 or runner.address:
        return ALONE
    per_gpu = 1  # Ray gives each its own
    if resolve_device(target.device).type == "cuda" and runner.kind != "ray":
        num_gpus = max(torch.cuda.device_count(), 1) if runner.kind == "processes" else 1
        per_gpu = math.ceil(num_workers / num_gpus)
    return MemoryShare(main=free_main_memory() // num_workers, processes_per_gpu=per_gpu)


def gpus_in_turn(
    visible: str | None, num_gpus: int, num_workers: int, *, each: int = 1
) -> Sequence[Mapping[str, str]]:
    """Return the variable that shows each child `each` of the GPUs which are `visible` here."""
    names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    places = (range(slot * each, (slot + 1) * each) for slot in range(num_workers))
    return [{VISIBLE_DEVICES: ",".join(names[one % len(names)] for one in own)} for own in places]


@functools.cache
def shared_pool() -> WorkerPool:
    """Return the pool of a cluster's worker: one child, which sees the GPUs of the worker."""
    return WorkerPool([{}], idle_seconds=IDLE_SECONDS)
