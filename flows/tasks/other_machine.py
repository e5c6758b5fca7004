"""Training on a machine that is not the first of its run: it takes part, and writes nothing."""

import logging
import time
from pathlib import Path

from eagle_core.draft.settings import DraftSettings
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.bridge.first_weights import read_start
from flows.errors import TrainingStoppedError
from flows.orchestration.stage_report import print_stage
from flows.summaries import TrainSummary
from flows.tasks.prepare import prepare_weights
from flows.workers.ranks import take_part
from flows.workers.run_of_machines import RunOfMachines

logger = logging.getLogger(__name__)


def train_with_first(
    target: TargetConfig,
    draft: DraftSettings,
    training: TrainingConfig,
    run_path: Path,
    *,
    title: str,
    limit_seconds: float | None = None,
) -> TrainSummary:
    """Train with the first machine of a run, as soon as that begins.

    Args:
        target: as the recipe has it.
        draft: settings of the draft, the same on all machines.
        training: settings of the run, the same on all machines.
        run_path: folder of the run, which all machines share.
        title: name of the run, unique among all targets and data sets.
        limit_seconds: how long to wait for the first machine; by default the setting's time.

    Raises:
        ChildKilledError: a process, or another machine, died; the last checkpoint is good.
        MachinesApartError: the machines did not meet in time.
        MismatchError: they have different settings, files or versions.
        TrainingStoppedError: a machine was stopped by SIGTERM.

    """
    prepare_weights(target)
    started = time.monotonic()
    run = RunOfMachines.here(title, target, draft, training, run_path)
    limit = training.node_timeout_seconds if limit_seconds is None else limit_seconds
    done = take_part(run, limit_seconds=limit)
    job, result = done.job, done.result
    if result.stopped:
        raise TrainingStoppedError(
            f"training {title} was stopped at step {result.num_steps} by SIGTERM to one of its "
            "machines; nothing is lost: run the same command on all machines to resume"
        )
    print_stage(
        f"Training: {title}",
        [
            ("steps", f"{result.num_steps:,}"),
            ("this machine", f"one of {training.nodes}, and not the first: it wrote nothing"),
            ("curves, report, evaluation", f"on the first machine, {training.rendezvous}"),
        ],
    )
    return TrainSummary(
        run_path=run_path,
        source_id=job.snapshot_id,
        num_steps=result.num_steps,
        figures=result.figures,
        vocabulary_coverage=job.coverage.share,
        coverage_by_source=job.coverage.by_source,
        tokens_per_second=result.tokens_per_second,
        dtype=result.dtype,
        seconds=time.monotonic() - started,
        start=read_start(run_path),
        best=result.best,
        decoded=result.decoded,
    )
