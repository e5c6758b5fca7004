"""Training in several processes of this machine, one per GPU; SIGTERM is passed on to them."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import closing

from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device
from eagle_core.training.result import Progress, TrainingResult
from eagle_core.training.stop_request import on_sigterm
from flows.errors import ChildKilledError
from flows.workers.torchrun import run_ranks
from flows.workers.train_worker import RankLine, TrainJob

logger = logging.getLogger(__name__)


def train_ranks(job: TrainJob, on_progress: Callable[[Progress], None]) -> TrainingResult:
    """Train in several processes; the result is the first one's.

    Raises:
        ChildKilledError: one of them died; the last checkpoint is good.

    """
    num_ranks = job.training.num_processes
    lines = run_ranks(
        "flows.workers.train_worker",
        job,
        num_ranks=num_ranks,
        environment=_rank_environment(job.target, num_ranks),
        what=f"training {job.title} in {num_ranks} processes (its last checkpoint is good: run the "
        "same command again to resume)",
    )
    result: TrainingResult | None = None
    first_rank = _FirstRank()
    try:
        with closing(lines), on_sigterm(first_rank.stop):  # type: ignore[type-var]  # a generator
            for line in map(RankLine.model_validate_json, lines):
                if line.progress is not None:
                    first_rank.has_done_a_step(line.pid)
                    on_progress(line.progress)
                if line.warning:
                    logger.warning("%s", line.warning)
                if line.result is not None:
                    first_rank.has_ended()
                    result = line.result
    except ChildKilledError:
        if result is None:  # else all work was done, and SIGTERM hit processes that were ending
            raise
    assert result is not None  # noqa: S101 (the first rank sends it last)
    return result


class _FirstRank:
    """The process that SIGTERM is passed on to, once, as soon as it has done a step."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._stop_requested = False

    def has_done_a_step(self, pid: int) -> None:
        self._pid = pid
        self._pass_on()

    def has_ended(self) -> None:
        self._pid = None

    def stop(self) -> None:
        self._stop_requested = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self._stop_requested and self._pid is not None:
            os.kill(self._pid, signal.SIGTERM)
            self._stop_requested = False


def _rank_environment(target: TargetConfig, num_ranks: int) -> Mapping[str, str]:
    """Return the variables added for the ranks: they share the processors of one machine."""
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    chosen = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    wanted = {name: value for name, value in chosen.items() if name not in os.environ}
    if resolve_device(target.device).type == "cpu":
        wanted["CUDA_VISIBLE_DEVICES"] = ""  # else they would communicate over unused GPUs
    return wanted
