"""Training in several processes, one per GPU, of one machine or of several.

SIGTERM is passed on to them. Each machine has the same view of a run: its own processes, of which
the first reports steps and the result.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device
from eagle_core.training.result import Progress, TrainingResult
from eagle_core.training.stop_request import on_sigterm
from flows.errors import ChildKilledError, MachinesApartError, TrainingStoppedError
from flows.workers.machines import GLOO_INTERFACE, Meeting, find_meeting, interface_of
from flows.workers.run_of_machines import RunOfMachines
from flows.workers.torchrun import run_ranks
from flows.workers.train_worker import RankLine, RankRequest, TrainJob

_APART = ("RendezvousTimeoutError", "RendezvousClosedError", "RendezvousConnectionError")
"""torchrun's errors if machines do not meet; the name of one is in its last output."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TookPart:
    """What another machine than the first one knows of a run when it has ended."""

    job: TrainJob
    result: TrainingResult


def train_ranks(
    job: TrainJob,
    on_progress: Callable[[Progress], None],
    *,
    meeting: Meeting | None = None,
    run: RunOfMachines | None = None,
) -> TrainingResult:
    """Train in several processes; the result is the first one's.

    Args:
        job: what to train.
        on_progress: called after every step.
        meeting: where this machine waits for others, if there are any.
        run: what must be the same on all of them.

    Raises:
        ChildKilledError: one of them died; the last checkpoint is good.
        MachinesApartError: not all machines came.
        TrainingStoppedError: SIGTERM came before all machines had.

    """
    meeting_id = meeting.meeting_id if meeting else ""
    request = RankRequest(job=job, run=run, meeting_id=meeting_id)
    attempt = _Attempt(request, job.title, meeting)
    return attempt.run(on_progress)


def take_part(run: RunOfMachines, *, limit_seconds: float) -> TookPart:
    """Train as another machine than the first one, as soon as that waits for others.

    Args:
        run: the run by the command of this machine; it must be that of the first.
        limit_seconds: how long to wait for the first machine.

    Raises:
        ChildKilledError: a process here, or another machine, died; the last checkpoint is good.
        MachinesApartError: the machines did not meet in time.
        MismatchError: the machines have different settings, files or versions.
        TrainingStoppedError: SIGTERM came before all machines had.

    """
    deadline = time.monotonic() + limit_seconds
    while True:
        with _ended_by_sigterm(run.title):
            meeting = find_meeting(run.training, run.run_path, deadline=deadline)
        request = RankRequest(job=None, run=run, meeting_id=meeting.meeting_id)
        attempt = _Attempt(request, run.title, meeting)
        try:
            result = attempt.run(lambda _progress: None)
        except MachinesApartError as error:
            if time.monotonic() > deadline:
                raise
            # What answered was about to end: its next attempt has another id.
            logger.warning("%s; waiting for its next attempt", error)
            continue
        assert attempt.joined is not None  # noqa: S101 (sent before the result)
        return TookPart(job=attempt.joined, result=result)


class _Attempt:
    """The processes of this machine in one attempt at a run."""

    def __init__(self, request: RankRequest, title: str, meeting: Meeting | None) -> None:
        self._request, self._title, self._meeting = request, title, meeting
        self.joined: TrainJob | None = None

    def run(self, on_progress: Callable[[Progress], None]) -> TrainingResult:
        known = self._request.known
        num_ranks = known.training.num_processes
        lines = run_ranks(
            "flows.workers.train_worker",
            self._request,
            num_ranks=num_ranks,
            environment=_rank_environment(known.target, num_ranks, self._meeting),
            what=self._what(num_ranks),
            meeting=self._meeting,
        )
        result: TrainingResult | None = None
        first_rank = _FirstRank()
        try:
            with closing(lines):  # type: ignore[type-var]  # a generator
                parsed = map(RankLine.model_validate_json, lines)
                if self._meeting is not None:
                    self.joined = self._until_met(parsed)
                with on_sigterm(first_rank.stop):
                    for line in parsed:
                        if line.progress is not None:
                            first_rank.has_done_a_step(line.pid)
                            on_progress(line.progress)
                        if line.warning:
                            logger.warning("%s", line.warning)
                        if line.result is not None:
                            first_rank.has_ended()
                            result = line.result
        except ChildKilledError as error:
            if self._meeting and not self.joined and any(name in str(error) for name in _APART):
                raise self._apart(self._meeting) from error
            if result is None:  # else all work was done, and SIGTERM hit processes that were ending
                raise
        assert result is not None  # noqa: S101 (the first rank sends it last)
        return result

    def _until_met(self, lines: Iterator[RankLine]) -> TrainJob | None:
        """Return the job, when all machines have met; None if the ranks have ended before."""
        with _ended_by_sigterm(self._title):
            for line in lines:
                if line.warning:
                    logger.warning("%s", line.warning)
                if line.joined is not None:
                    return line.joined
        return None

    def _what(self, num_ranks: int) -> str:
        if self._meeting is None:
            return (
                f"training {self._title} in {num_ranks} processes (its last checkpoint is good: "
                "run the same command again to resume)"
            )
        return (
            f"training {self._title} on {self._meeting.num_machines} machines (one of them, or its "
            "processes, may be gone; the last checkpoint is good: run the same command again on "
            "all machines to resume)"
        )

    def _apart(self, meeting: Meeting) -> MachinesApartError:
        return MachinesApartError(
            f"not all {meeting.num_machines} machines of run {self._title} came to "
            f"{meeting.rendezvous} within {meeting.timeout_seconds} s "
            "(training.node_timeout_seconds), or one left before the first step; nothing is lost: "
            "run the same command on all machines"
        )


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


@contextmanager
def _ended_by_sigterm(title: str) -> Iterator[None]:
    """Let SIGTERM end the block: there is no step to wait for until all machines have met."""

    def stop() -> None:
        raise TrainingStoppedError(
            f"training {title} was stopped by SIGTERM while it waited for other machines; nothing "
            "is lost: run the same command again"
        )

    with on_sigterm(stop):
        yield


def _rank_environment(
    target: TargetConfig, num_ranks: int, meeting: Meeting | None
) -> Mapping[str, str]:
    """Return the variables added for the ranks: they share the processors of one machine."""
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    chosen = {"OMP_NUM_THREADS": str(threads)}
    if meeting is None:
        chosen[GLOO_INTERFACE] = "lo0" if sys.platform == "darwin" else "lo"
    elif (interface := interface_of(meeting.local_address)) is not None:
        chosen[GLOO_INTERFACE] = interface
    wanted = {name: value for name, value in chosen.items() if name not in os.environ}
    if resolve_device(target.device).type == "cpu":
        wanted["CUDA_VISIBLE_DEVICES"] = ""  # else they would communicate over unused GPUs
    return wanted
