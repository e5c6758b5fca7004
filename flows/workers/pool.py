"""The child processes that make shards: each lives on, so it loads its target once.

Each has a place, which one batch at a time may have. What dies is replaced when its place is taken
the next time.
"""

import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device
from flows.errors import ChildKilledError, RunStoppedError
from flows.workers.child_process import Child
from flows.workers.shard_worker import ShardJob, ShardReport

IDLE_SECONDS = 60.0
"""A cluster's worker keeps its child for this long after a batch: another run may need the GPU."""
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class ShardProcesses:
    """Children that make shards, one for each place; a batch waits until a place is free."""

    def __init__(
        self, places: Sequence[Mapping[str, str]], *, idle_seconds: float | None = None
    ) -> None:
        """Have a place for each environment; end children that nobody asks for `idle_seconds`."""
        self._places = list(places)
        self._children: list[Child | None] = [None] * len(self._places)
        self._timers: list[threading.Timer | None] = [None] * len(self._places)
        self._idle_seconds = idle_seconds
        self._free: SimpleQueue[int] = SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        for place in range(len(self._places)):
            self._free.put(place)

    def make(self, job: ShardJob, *, what: str, silence_seconds: float) -> Iterator[ShardReport]:
        """Yield what a child says while it makes the shards of `job`.

        Raises:
            ChildKilledError: the child died without an answer, or hung and was killed.
            EagleCoreError, StorageError: what it reported, as it raised it.
            RunStoppedError: `close` was called.

        """
        try:
            with self._child() as child:
                for line in child.ask(job, what=what, silence_seconds=silence_seconds):
                    yield ShardReport.model_validate_json(line)
        except ChildKilledError as error:
            if self._is_closed:  # not to be tried again
                raise RunStoppedError(f"{what} was ended, because the run was") from error
            raise

    @contextmanager
    def _child(self) -> Iterator[Child]:
        place = self._free.get()
        try:
            with self._lock:
                if self._is_closed:
                    raise RunStoppedError("the run has ended")
                self._stop_timer(place)
                child = self._children[place]
                if child is None:
                    child = Child("flows.workers.shard_worker", environment=self._places[place])
                    self._children[place] = child
            yield child
        finally:
            with self._lock:
                self._look_after(place)
            self._free.put(place)

    def close(self) -> None:
        """End all children, whatever they are at, and start no other."""
        with self._lock:
            self._is_closed = True
            for place in range(len(self._places)):
                self._stop_timer(place)
                self._end(place)

    def _look_after(self, place: int) -> None:
        child = self._children[place]
        if child is not None and not child.is_idle:
            self._end(place)
        elif self._idle_seconds is not None:
            timer = threading.Timer(self._idle_seconds, self._end_idle, (place,))
            timer.daemon = True
            self._timers[place] = timer
            timer.start()

    def _end_idle(self, place: int) -> None:
        with self._lock:
            if self._timers[place] is threading.current_thread():  # nobody took it meanwhile
                self._end(place)

    def _stop_timer(self, place: int) -> None:
        timer, self._timers[place] = self._timers[place], None
        if timer is not None:
            timer.cancel()

    def _end(self, place: int) -> None:
        child, self._children[place] = self._children[place], None
        if child is not None:
            child.close()


def places_here(target: TargetConfig, num_workers: int) -> Sequence[Mapping[str, str]]:
    """Return what the environments of children on this machine differ in: each has its own GPU.

    With fewer GPUs than children, they share them in turn. One child sees what this process sees.
    """
    if num_workers == 1 or resolve_device(target.device).type != "cuda":
        return [{}] * num_workers
    return gpus_in_turn(os.environ.get(VISIBLE_DEVICES), torch.cuda.device_count(), num_workers)


def gpus_in_turn(
    visible: str | None, num_gpus: int, num_workers: int
) -> Sequence[Mapping[str, str]]:
    """Return the variable that shows each child one of the GPUs which are `visible` here."""
    names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    return [{VISIBLE_DEVICES: names[place % len(names)]} for place in range(num_workers)]


@functools.cache
def kept_processes() -> ShardProcesses:
    """Return the child of a process that a cluster started; it sees the GPUs that this one sees."""
    return ShardProcesses([{}], idle_seconds=IDLE_SECONDS)
