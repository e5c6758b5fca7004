"""`train`: a draft from the snapshot of its data, resumed from the newest good checkpoint."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.samples import SampleSource
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.tracking.config import TrackingConfig
from eagle_core.tracking.tensorboard import TENSORBOARD_FOLDER
from eagle_core.tracking.trackers import open_trackers, require_trackers
from eagle_core.training.config import TrainingConfig
from eagle_core.training.result import Progress, TrainingResult
from eagle_core.training.schedule import learning_rate, total_steps
from eagle_core.training.trainer import train
from flows.bridge.draft_setup import VOCABULARY_NAME, DraftSetup, choose_vocabulary, set_up_draft
from flows.bridge.recompute import TargetRecompute, partial_target
from flows.bridge.run import Run, write_run
from flows.bridge.run_lock import RunLock, sole_training
from flows.bridge.semantic_probe import require_sound
from flows.bridge.store_identity import open_store
from flows.bridge.training_data import held_by_run, training_data
from flows.config.store import StoreConfig
from flows.errors import TrainingStoppedError
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.best_effort import best_effort
from flows.orchestration.credentials import store_root
from flows.orchestration.progress import stage_progress
from flows.orchestration.run_name import run_name
from flows.reports import rows as report
from flows.reports.run_page import loss_plot, read_curves, write_run_page
from flows.reports.run_record import (
    TRAINING_NAME,
    RunRecord,
    StorageBill,
    write_settings,
    write_stage,
)
from flows.summaries import TrainSummary
from flows.tasks.prepare import prepare_weights
from flows.workers.ranks import train_ranks
from flows.workers.train_worker import TrainJob, open_sources, tracked_run
from flows.workspace import DEFAULT_HOME, RunName, Workspace
from storage.records.snapshot import Snapshot
from storage.store import Store

logger = logging.getLogger(__name__)

Attempt = Callable[[Callable[[Progress], None]], TrainingResult]
"""Trains to the end or until it is asked to stop, and tells every step."""


@flow(
    name="train",
    flow_run_name=run_name("train-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def train_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
    training: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    tracking: TrackingConfig = TrackingConfig(),  # noqa: B008 (frozen)
    home: str = DEFAULT_HOME,
    run: RunName = "main",
    snapshot_id: str | None = None,
) -> TrainSummary:
    """Train the draft of run `run` from the snapshot of its data set, or from `snapshot_id`.

    A run that has begun goes on from its newest checkpoint, with its own snapshot whatever was
    published since, and ends in the same bits as an undisturbed one; no data set is read for that.

    Raises:
        ConfigError: there is no store, states are missing, fewer GPUs than processes, or no
            package for a tracker.
        MismatchError: the store, the snapshot or the checkpoints belong to something else.
        CorruptError: a shard does not hold what the target said.
        ChildKilledError: one of several processes died; the last checkpoint is good.
        RunBusyError: another process trains the same run; says which.
        TrainingStoppedError: SIGTERM ended it; the checkpoint is written.

    """
    _require_devices(target, training.num_processes)
    require_trackers(tracking)
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    run_path = space.run_path(run)
    prepare_weights(target)
    root = store_root(store, space)
    opened = open_store(target, store, root)
    if snapshot_id is None and run in opened.snapshot_ids():
        snapshot_id = run  # as automations of a version without this parameter name their runs
    data = training_data(
        opened, target, dataset, training, space, run_path, snapshot_id=snapshot_id
    )
    snapshot, tokens = data.snapshot, data.tokens
    opened.require_present(snapshot, commits=data.commits)
    title = f"{target.name}-{dataset.name}-{run}"
    with sole_training(run_path) as lock, held_by_run(opened, run_path, data):
        coverage = (
            data.record.vocabulary_coverage
            if data.record and (run_path / VOCABULARY_NAME).exists()
            else choose_vocabulary(target, training, TokenFile(tokens.train_path), run_path)
        )
        job = TrainJob(
            target=target,
            training=training,
            tracking=tracking,
            title=title,
            store_root=root,
            snapshot_id=snapshot.snapshot_id,
            held_out_tokens=tokens.held_out_path,
            run_path=run_path,
            object_cache=None if opened.is_local else space.object_cache_path,
            object_cache_bytes=store.cache_bytes,
        )
        if data.record:
            data.record.require_vocabulary(run_path)
        # Ranks find the first GPU empty.
        is_alone = training.num_processes == 1
        here = target if is_alone else target.model_copy(update={"device": "cpu"})
        setup = set_up_draft(here, training, run_path)
        _require_sound(setup, here, opened, snapshot)
        record = Run.of(
            target,
            data.record.dataset if data.record else dataset,
            store,
            training,
            tracking,
            title=title,
            source_id=snapshot.snapshot_id,
            store_root=root,
            tokens=tokens,
            setup=setup,
            vocabulary_coverage=coverage,
        )

        total = total_steps(
            training, snapshot.lengths, snapshot.groups, world_size=training.num_processes
        )

        def write_down() -> None:
            write_run(run_path, record, begun=data.record)
            bill = StorageBill.of(opened, data.commits)
            write_settings(
                run_path,
                record,
                tokens,
                bill,
                total_steps=total,
                excluded=data.commits.excluded,
            )

        if data.begun:
            warn_of_another_length(run_path, training, total, step=data.begun.step)
        if is_alone:
            source, held_out = open_sources(job, data.commits)
            return run_training(setup, source, held_out, record, lock, write_down=write_down)
        del setup
        return _summarised(
            lambda on_progress: train_ranks(job, on_progress),
            *(run_path, record, lock),
            total=total,
            write_down=write_down,
        )


def run_training(
    setup: DraftSetup,
    source: SampleSource,
    held_out: SampleSource | None,
    run: Run,
    lock: RunLock,
    *,
    write_down: Callable[[], None],
) -> TrainSummary:
    """Train in this process, from any source: what the offline and the online flow share.

    `lock` is that of the run's folder; `write_down` records what the run is made with, once a step
    shows that the run takes it.
    """

    def attempt(on_progress: Callable[[Progress], None]) -> TrainingResult:
        tracked = tracked_run(run.title, setup.run_path, run.training, source.source_id)
        with open_trackers(run.tracking, tracked) as tracker:
            return train(
                config=run.training,
                draft=setup.draft,
                target_lm_head=setup.target_lm_head,
                source=source,
                held_out=held_out,
                run_path=setup.run_path,
                tracker=tracker,
                on_progress=on_progress,
            )

    total = total_steps(run.training, source.lengths, source.groups)
    return _summarised(attempt, setup.run_path, run, lock, total=total, write_down=write_down)


def _summarised(
    attempt: Attempt,
    run_path: Path,
    run: Run,
    lock: RunLock,
    *,
    total: int,
    write_down: Callable[[], None],
) -> TrainSummary:
    """Show the progress of `attempt` and report what came out."""
    started = time.monotonic()
    key = artifact_key("train", run.title)
    with stage_progress("training", key=key, total=total, unit="steps") as bar:
        is_written = False

        def show(progress: Progress) -> None:
            nonlocal is_written
            lock.require()
            if not is_written:
                write_down()
                is_written = True
            bar.move_to(progress.step, note=f"loss {progress.loss:.3f}")

        result = attempt(show)
        if not is_written:  # there was no step left to do
            write_down()
    if result.stopped:
        raise TrainingStoppedError(
            f"training {run.title} was stopped at step {result.num_steps} of about {total} by "
            f"SIGTERM; nothing is lost ({result.checkpoint_path} is written): run the same command "
            "again, or press Retry in the Prefect UI, to go on from there"
        )
    earlier = _earlier(run_path, result)
    summary = TrainSummary(
        run_path=run_path,
        source_id=run.source_id,
        num_steps=result.num_steps,
        figures=result.figures,
        vocabulary_coverage=run.vocabulary_coverage,
        tokens_per_second=earlier.tokens_per_second if earlier else result.tokens_per_second,
        dtype=result.dtype,
        seconds=earlier.seconds if earlier else time.monotonic() - started,
    )
    write_stage(run_path / TRAINING_NAME, summary)
    with best_effort("report.html"):
        _report(summary, run.title)
    return summary


def warn_of_another_length(
    run_path: Path, training: TrainingConfig, total: int, *, step: int
) -> None:
    """Warn where a run that goes on was to have another length: its learning rate is of that."""
    before = RunRecord.read(run_path).settings
    if before is None or before.total_steps in {None, total}:
        return
    if step >= total:
        logger.warning(
            "run %s has done %s steps, and %s are asked for: there is nothing to do",
            *(run_path.name, f"{step:,}", f"{total:,}"),
        )
        return
    was, becomes = (learning_rate(training, step, length) for length in (before.total_steps, total))
    logger.warning(
        "run %s was to have %s steps and now has %s: its learning rate goes from %.2g to %.2g at "
        "step %s (another run with %s steps from its start has no such jump)",
        *(run_path.name, f"{before.total_steps:,}", f"{total:,}", was, becomes),
        *(f"{step:,}", f"{total:,}"),
    )


def _report(summary: TrainSummary, title: str) -> None:
    """Write the page of the run, and show figures and loss in the Prefect UI."""
    curves = read_curves(summary.run_path / TENSORBOARD_FOLDER)
    write_run_page(summary.run_path, curves)
    report.publish_table(
        f"Training: {title}",
        [*report.train_rows(summary), *report.where_a_run_is(summary.run_path)],
        key=artifact_key("training", title),
    )
    drawn = loss_plot(curves)
    if drawn is not None:
        report.publish_plot(f"Loss: {title}", drawn[1], key=artifact_key("loss", title))


def _earlier(run_path: Path, result: TrainingResult) -> TrainSummary | None:
    """Return what a run took that was done already, and None of one that this attempt moved."""
    found = RunRecord.read(run_path).training
    is_same = found is not None and found.num_steps == result.num_steps
    return found if is_same and not result.tokens_per_second else None


def _require_sound(
    setup: DraftSetup, target: TargetConfig, store: Store, snapshot: Snapshot
) -> None:
    partial = partial_target(target, store.identity)
    require_sound(store, snapshot, TargetRecompute(setup.target_lm_head, partial))


def _require_devices(target: TargetConfig, num_processes: int) -> None:
    num_gpus = torch.cuda.device_count()
    if resolve_device(target.device).type == "cuda" and num_processes > max(num_gpus, 1):
        raise ConfigError(
            f"training.num_processes is {num_processes}, but this machine shows {num_gpus} GPUs "
            "(CUDA_VISIBLE_DEVICES counts): each process needs one of its own. Set it to "
            f"{max(num_gpus, 1)} at most"
        )
