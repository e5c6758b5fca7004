"""Train a draft from any source, show the progress, and report the result."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from eagle_core.samples import SampleSource
from eagle_core.target.model import TargetModel
from eagle_core.tracking.trackers import open_trackers
from eagle_core.training.result import Progress, TrainingResult
from eagle_core.training.trainer import train
from flows.bridge.draft_decoder import DraftsToDecode
from flows.bridge.draft_setup import DraftSetup
from flows.bridge.first_weights import read_start
from flows.bridge.run import Run
from flows.bridge.run_lock import RunLock
from flows.errors import TrainingStoppedError
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_plot, publish_table
from flows.orchestration.best_effort import best_effort
from flows.orchestration.progress import stage_progress
from flows.reports import rows as report
from flows.reports.run_page import loss_plot, read_curves, write_run_page
from flows.reports.run_record import (
    TRAINING_NAME,
    RunRecord,
    write_stage,
)
from flows.summaries import TrainSummary
from flows.tasks.attempt_length import AttemptLength
from flows.workers.decoders import open_decoder
from flows.workers.train_worker import begin, tracked_run

logger = logging.getLogger(__name__)

Attempt = Callable[[Callable[[Progress], None]], TrainingResult]
"""Trains to the end or until asked to stop, and reports every step."""


def run_training(
    setup: DraftSetup,
    source: SampleSource,
    held_out: SampleSource | None,
    run: Run,
    lock: RunLock,
    *,
    length: AttemptLength,
    write_record: Callable[[], None],
    refetch_samples: bool = True,
    decoding: DraftsToDecode | None = None,
    decoding_target: Callable[[], TargetModel] | None = None,
) -> TrainSummary:
    """Train in this process, from any source: shared by the offline and the online flow.

    Args:
        setup: the untrained draft.
        source: the training samples.
        held_out: samples to measure on, if any.
        run: the record of the run.
        lock: of the run's folder.
        length: of the attempt.
        write_record: records the run's settings, once a step shows that the run accepts them.
        refetch_samples: whether samples may be read several times for the first weights.
        decoding: what is decoded meanwhile, if anything.
        decoding_target: returns the target for that; by default it is loaded.

    """

    def attempt(on_progress: Callable[[Progress], None]) -> TrainingResult:
        tracked = tracked_run(
            *(run.title, setup.run_path, run.settings_of_draft, run.training, source.source_id)
        )
        with (
            open_trackers(run.tracking, tracked) as tracker,
            open_decoder(decoding, setup.run_path, decoding_target) as decoder,
        ):
            training = begin(
                setup, source, held_out, run.training, tracker, refetch=refetch_samples
            )
            return train(
                config=training,
                draft=setup.draft,
                target_lm_head=setup.target_lm_head,
                source=source,
                held_out=held_out,
                run_path=setup.run_path,
                tracker=tracker,
                decoder=decoder,
                planned=length.planned,
                on_progress=on_progress,
            )

    return run_attempt(
        attempt, setup.run_path, run, lock, total=length.total, write_record=write_record
    )


def run_attempt(
    attempt: Attempt,
    run_path: Path,
    run: Run,
    lock: RunLock,
    *,
    total: int,
    write_record: Callable[[], None],
) -> TrainSummary:
    """Show the progress of `attempt` and report its result."""
    started = time.monotonic()
    key = artifact_key("train", run.title)
    with stage_progress("training", key=key, total=total, unit="steps") as bar:
        is_written = False

        def show(progress: Progress) -> None:
            nonlocal is_written
            lock.require()
            if not is_written:
                write_record()
                is_written = True
            bar.move_to(progress.step, note=f"loss {progress.loss:.3f}")

        result = attempt(show)
        if not is_written:  # no step was left to do
            write_record()
    if result.stopped:
        raise TrainingStoppedError(
            f"training {run.title} was stopped at step {result.num_steps} of about {total} by "
            f"SIGTERM; nothing is lost ({result.checkpoint_path} is written): run the same command "
            "again, or press Retry in the Prefect UI, to resume from there"
        )
    earlier = _earlier(run_path, result)
    summary = TrainSummary(
        run_path=run_path,
        source_id=run.source_id,
        num_steps=result.num_steps,
        figures=result.figures,
        vocabulary_coverage=run.vocabulary_coverage,
        coverage_by_source=run.coverage_by_source,
        tokens_per_second=earlier.tokens_per_second if earlier else result.tokens_per_second,
        dtype=result.dtype,
        seconds=earlier.seconds if earlier else time.monotonic() - started,
        start=read_start(run_path),
        best=result.best,
        decoded=result.decoded,
    )
    write_stage(run_path / TRAINING_NAME, summary)
    with best_effort("report.html"):
        _report(summary, run.title)
    return summary


def _report(summary: TrainSummary, title: str) -> None:
    """Write the page of the run, and show figures and loss in the Prefect UI."""
    curves = read_curves(summary.run_path)
    write_run_page(summary.run_path, curves)
    publish_table(
        f"Training: {title}",
        [*report.train_rows(summary), *report.where_a_run_is(summary.run_path)],
        key=artifact_key("training", title),
    )
    drawn = loss_plot(curves)
    if drawn is not None:
        publish_plot(f"Loss: {title}", drawn[1], key=artifact_key("loss", title))


def _earlier(run_path: Path, result: TrainingResult) -> TrainSummary | None:
    """Return the summary of a run that was already finished; None if this attempt trained."""
    found = RunRecord.read(run_path).training
    is_same = found is not None and found.num_steps == result.num_steps
    return found if is_same and not result.tokens_per_second else None
