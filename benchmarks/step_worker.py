"""Both ends of a protocol in JSON lines: a process that runs training steps on request.

Each peer runs in a separate process, so that its memory can be measured and its turn ended. It
loads, runs one small step at learning rate 0 (which creates the optimizer's state), sends `Ready`,
and then answers each line with a `Turn`. Imports nothing of Eyas. Linux only: memory is read from
`/proc`, because `ru_maxrss` starts at the size of the parent process; on a GPU it is the memory
that torch has allocated.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.step_case import StepCase

MAX_GRAD_NORM = 0.5
LEARNING_RATE = 1e-4
_SAMPLED_GRADIENTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An implementation of the step; backward, clipping and optimizer are called the same way."""

    trained: Sequence[Parameter]
    optimizer: torch.optim.Optimizer
    fusion: Parameter
    """The weight that fuses the aux states: its gradient has passed through everything else."""
    prepare: Callable[[StepCase], Callable[[], Tensor]]
    """Creates the batch of a case; returns a function that computes the loss of that batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Sent once, before the first turn."""

    loaded_bytes: int
    """Weights, optimizer state and batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One whole step: forward, backward, clipping, optimizer."""

    wall_seconds: float
    cpu_seconds: float
    loss: float
    gradients: tuple[float, ...]
    """Some entries of the fusion weight's gradient before clipping, evenly spaced."""
    step_bytes: int
    """Peak of the process, or on its GPU, above the loaded memory."""


class PeerFailedError(Exception):
    """A peer did not answer; the message has the reason."""


def serve(load: Callable[[StepCase, str], Peer]) -> None:
    """Run steps until standard input ends. For the child: CASE --threads --memory-gib --variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory-gib", type=float, required=True)
    parser.add_argument("--variant", default="")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    case = StepCase.read(arguments.case)
    torch.set_num_threads(arguments.threads)
    try:
        memory = _memory(case.device, limit=int(arguments.memory_gib * 2**30))
        _answer(lambda: load(case, arguments.variant), case, memory, answers.write)
    except (RuntimeError, MemoryError) as error:  # torch's allocator raises RuntimeError
        answers.write(json.dumps({"failed": _reason(error)}) + "\n")


def _answer(
    load: Callable[[], Peer], case: StepCase, memory: "_Memory", write: Callable[[str], object]
) -> None:
    imported = memory.now()
    peer = load()
    _set_learning_rate(peer, 0.0)
    _step(peer, peer.prepare(case.warm_up()), case)
    loss_of_batch = peer.prepare(case)
    if case.device != "cpu":  # there, kernels are chosen or compiled for the sizes of the case
        _step(peer, loss_of_batch, case)
    _set_learning_rate(peer, LEARNING_RATE)
    memory.reset_peak()
    loaded = memory.now()
    write(json.dumps(asdict(Ready(loaded_bytes=loaded - imported))) + "\n")
    while _is_requested():
        started = time.perf_counter(), time.process_time()
        loss, gradient = _step(peer, loss_of_batch, case)
        turn = Turn(
            wall_seconds=time.perf_counter() - started[0],
            cpu_seconds=time.process_time() - started[1],
            loss=loss,
            gradients=tuple(gradient.tolist()),
            step_bytes=memory.peak() - loaded,
        )
        write(json.dumps(asdict(turn)) + "\n")


def _is_requested() -> bool:
    try:
        return input() == "step"
    except EOFError:
        return False


def _step(peer: Peer, loss_of_batch: Callable[[], Tensor], case: StepCase) -> tuple[float, Tensor]:
    with _precision(case):
        loss = loss_of_batch()
    loss.backward()  # type: ignore[no-untyped-call]  # torch
    assert peer.fusion.grad is not None
    entries = peer.fusion.grad.flatten()
    gradient = entries[:: max(1, len(entries) // _SAMPLED_GRADIENTS)].clone()
    torch.nn.utils.clip_grad_norm_(peer.trained, MAX_GRAD_NORM)
    peer.optimizer.step()
    peer.optimizer.zero_grad(set_to_none=True)
    gradient = gradient.cpu()
    if case.device != "cpu":
        torch.cuda.synchronize()
    return loss.item(), gradient


def _precision(case: StepCase) -> contextlib.AbstractContextManager[object]:
    if case.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(case.device, dtype=getattr(torch, case.dtype))


def _set_learning_rate(peer: Peer, rate: float) -> None:
    for group in peer.optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Memory:
    """Memory in use; loading must not count for the step."""

    now: Callable[[], int]
    peak: Callable[[], int]
    reset_peak: Callable[[], object]


def _memory(device: str, *, limit: int) -> _Memory:
    """Return the gauge of a device; on a CPU, limit the process to `limit` bytes."""
    if device != "cpu":
        return _Memory(
            now=torch.cuda.memory_allocated,
            peak=torch.cuda.max_memory_allocated,
            reset_peak=torch.cuda.reset_peak_memory_stats,
        )
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return _Memory(
        now=lambda: _resident_bytes("VmRSS"),
        peak=lambda: _resident_bytes("VmHWM"),
        reset_peak=lambda: Path("/proc/self/clear_refs").write_text("5", encoding="utf-8"),
    )


def _resident_bytes(field: str) -> int:
    """Return VmRSS (resident now) or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _reason(error: Exception) -> str:
    text = str(error)
    if "can't allocate memory" in text or "out of memory" in text or isinstance(error, MemoryError):
        return "does not fit into memory"
    return text.splitlines()[0] if text else type(error).__name__


class Worker:
    """The requesting end: one peer's process, killed when it is late."""

    def __init__(
        self, command: Sequence[str], *, log_path: Path, environment: dict[str, str]
    ) -> None:
        self._log_path = log_path
        with log_path.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def ready(self, seconds: float) -> Ready:
        """Wait until it has loaded.

        Raises:
            PeerFailedError: it is late, or it ended.

        """
        return Ready(**self._read(seconds))

    def turn(self, seconds: float) -> Turn:
        """Request one step; raise the same errors."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailedError(self._exit_reason()) from None
        fields = self._read(seconds)
        return Turn(**{**fields, "gradients": tuple(fields["gradients"])})

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        in_time = timer.is_alive()
        timer.cancel()
        if not line:
            late = f"no answer within {seconds:.0f} s"
            raise PeerFailedError(self._exit_reason() if in_time else late)
        fields: dict[str, Any] = json.loads(line)
        if "failed" in fields:
            raise PeerFailedError(fields["failed"])
        return fields

    def _exit_reason(self) -> str:
        status = self._process.wait()
        if status == -9:
            return "killed, probably out of memory"
        lines = self._log_path.read_text(encoding="utf-8").strip().splitlines()
        return f"ended with status {status}: {lines[-1] if lines else 'no message'}"
