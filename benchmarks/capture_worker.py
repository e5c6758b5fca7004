"""One capture in a process of its own: `python -m benchmarks.capture_worker` with a `Job` on stdin.

Prints a `Done`. Memory is `RssAnon` of /proc (Linux), which leaves out mapped files, above that of
the process before the target is loaded.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel

from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.placement import load_target
from eagle_core.tokenization.token_file import TokenFile

_SAMPLED_EVERY = 0.05
_SELF = psutil.Process()


class Job(BaseModel):
    """What to capture."""

    target: TargetConfig
    token_file: Path
    num_tokens: int
    rounds: int


class Done(BaseModel):
    """What it took."""

    num_tokens: int
    seconds: list[float]
    """Of each round."""
    peak_bytes: int
    placement: str


class _Peak:
    num_bytes = 0


@contextmanager
def _peak_memory() -> Iterator[_Peak]:
    peak, ended = _Peak(), threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLED_EVERY):
            peak.num_bytes = max(peak.num_bytes, _anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    ended.set()
    thread.join()


def _anonymous_bytes() -> int:
    """Return the size of the memory of this process and its children that is no file's."""
    return sum(map(_of_process, [os.getpid(), *(one.pid for one in _SELF.children())]))


def _of_process(number: int) -> int:
    try:
        lines = Path(f"/proc/{number}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended
        return 0
    sizes = (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return next(sizes, 0)


def main() -> None:
    """Run the job of stdin."""
    job = Job.model_validate_json(sys.stdin.read())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    file, samples = TokenFile(job.token_file), []
    for sample in file:
        samples.append(sample)
        if sum(map(len, samples)) >= job.num_tokens:
            break
    idle = _anonymous_bytes()
    seconds = []
    with _peak_memory() as peak:
        target = load_target(job.target)
        for _ in capture_states(target, samples[:1]):
            pass  # warm up: one-time costs are not measured
        for _ in range(job.rounds):
            began = time.perf_counter()
            for _ in capture_states(target, samples):
                pass
            seconds.append(time.perf_counter() - began)
    done = Done(
        num_tokens=sum(map(len, samples)),
        seconds=seconds,
        peak_bytes=peak.num_bytes - idle,
        placement=type(target).__name__,
    )
    sys.stdout.write(done.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
