"""`train`: a draft from the snapshot of its data, resumed from the newest good checkpoint."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from prefect import flow

from eagle_core.dataset_config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.hosted_trackers import TrackingConfig, open_trackers, require_trackers
from eagle_core.samples import SampleSource
from eagle_core.schedule import total_steps
from eagle_core.target import resolve_device
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from eagle_core.trackers import TENSORBOARD_FOLDER
from eagle_core.trainer import train
from eagle_core.training_config import TrainingConfig
from eagle_core.training_result import Progress, TrainingResult
from flows import report
from flows.artifact_key import artifact_key
from flows.child_process import ask_ranks
from flows.config import StoreConfig
from flows.draft_setup import DraftSetup, set_up_draft
from flows.errors import ChildKilledError, TrainingStoppedError
from flows.identity import store_identity
from flows.prepare import prepare
from flows.progress import stage_progress
from flows.recompute import TargetRecompute, partial_target
from flows.run_name import run_name
from flows.run_page import loss_plot, read_curves, write_run_page
from flows.run_record import TRAINING_NAME, RunRecord, StorageBill, write_settings, write_stage
from flows.semantic_probe import require_sound
from flows.sole_training import sole_training
from flows.store_root import store_root
from flows.summaries import TrainSummary
from flows.train_worker import RankLine, TrainJob, open_sources, tracked_run
from flows.training_snapshot import training_snapshot
from flows.workspace import DEFAULT_HOME, RunName
from storage.store import Store

Attempt = Callable[[Callable[[Progress], None]], TrainingResult]
"""Trains to the end or until it is asked to stop, and tells every step."""

logger = logging.getLogger(__name__)


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
) -> TrainSummary:
    """Train the draft of run `run` from the snapshot of its data set, or the latest version of it.

    A retry goes on from the newest checkpoint and ends in the same bits as an undisturbed run, also
    when other data was published meanwhile: it keeps its snapshot.

    Raises:
        ConfigError: there is no store or no snapshot yet, fewer GPUs than processes, or no
            package for a tracker.
        MismatchError: the store, the snapshot or the checkpoints belong to something else.
        CorruptError: a shard does not hold what the target said.
        ChildKilledError: one of several processes died; the last checkpoint is good.
        RunBusyError: another process of this machine trains the same run.
        TrainingStoppedError: SIGTERM ended it; the checkpoint is written.

    """
    _require_devices(target, training.num_processes)
    require_trackers(tracking)
    space, tokens = prepare(target, dataset, home)
    root = store_root(store, space)
    Store.open(root)  # a clear error when there is none, rather than an empty new one
    opened = Store.create(root, store_identity(target, store, tokens))
    snapshot = training_snapshot(opened, tokens, dataset.name, space.run_path(run))
    opened.require_present(snapshot)
    title = f"{target.name}-{dataset.name}-{run}"
    job = TrainJob(
        target=target,
        training=training,
        tracking=tracking,
        title=title,
        store_root=root,
        snapshot_id=snapshot.snapshot_id,
        train_tokens=tokens.train_path,
        held_out_tokens=tokens.held_out_path,
        run_path=space.run_path(run),
        object_cache=None if opened.is_local else space.object_cache_path,
        object_cache_bytes=store.cache_bytes,
    )

    def describe_run() -> None:
        write_settings(
            job.run_path,
            tokens,
            {
                "target": target,
                "dataset": dataset,
                "store": store,
                "training": training,
                "tracking": tracking,
            },
            title=title,
            source_id=snapshot.snapshot_id,
            bill=StorageBill.of(opened),
        )

    if training.num_processes == 1:
        setup = _sound_setup(job, target, opened)
        source, held_out = open_sources(job)
        return run_training(
            training, tracking, setup, source, held_out, title=title, describe_run=describe_run
        )
    # The ranks find the draft vocabulary written, and the first GPU empty.
    here = target.model_copy(update={"device": "cpu"})
    coverage = _sound_setup(job, here, opened).vocabulary_coverage
    return _summarised(
        lambda on_progress: _train_ranks(job, on_progress, title=title),
        total=total_steps(
            training, snapshot.lengths, snapshot.groups, world_size=training.num_processes
        ),
        run_path=job.run_path,
        source_id=snapshot.snapshot_id,
        vocabulary_coverage=coverage,
        title=title,
        describe_run=describe_run,
    )


def run_training(
    training: TrainingConfig,
    tracking: TrackingConfig,
    setup: DraftSetup,
    source: SampleSource,
    held_out: SampleSource | None,
    *,
    title: str,
    describe_run: Callable[[], None],
) -> TrainSummary:
    """Train in this process, from any source: what the offline and the online flow share.

    `describe_run` writes the settings down, once a step shows that the run takes them.
    """

    def attempt(on_progress: Callable[[Progress], None]) -> TrainingResult:
        run = tracked_run(title, setup.run_path, training, source.source_id)
        with open_trackers(tracking, run) as tracker:
            return train(
                config=training,
                draft=setup.draft,
                target_lm_head=setup.target_lm_head,
                source=source,
                held_out=held_out,
                run_path=setup.run_path,
                tracker=tracker,
                on_progress=on_progress,
            )

    return _summarised(
        attempt,
        total=total_steps(training, source.lengths, source.groups),
        run_path=setup.run_path,
        source_id=source.source_id,
        vocabulary_coverage=setup.vocabulary_coverage,
        title=title,
        describe_run=describe_run,
    )


def _summarised(
    attempt: Attempt,
    *,
    total: int,
    run_path: Path,
    source_id: str,
    vocabulary_coverage: float,
    title: str,
    describe_run: Callable[[], None],
) -> TrainSummary:
    """Show the progress of `attempt` and report what came out."""
    started = time.monotonic()
    key = artifact_key("train", title)
    with (
        sole_training(run_path),
        stage_progress("training", key=key, total=total, unit="steps") as bar,
    ):
        is_described = False

        def show(progress: Progress) -> None:
            nonlocal is_described
            if not is_described:
                describe_run()
                is_described = True
            bar.move_to(progress.step, note=f"loss {progress.loss:.3f}")

        result = attempt(show)
        if not is_described:  # there was no step left to do
            describe_run()
    if result.stopped:
        raise TrainingStoppedError(
            f"training {title} was stopped at step {result.num_steps} of about {total} by SIGTERM; "
            f"nothing is lost ({result.checkpoint_path} is written): run the same command again, "
            "or press Retry in the Prefect UI, to go on from there"
        )
    earlier = _earlier(run_path, result)
    summary = TrainSummary(
        run_path=run_path,
        source_id=source_id,
        num_steps=result.num_steps,
        figures=result.figures,
        vocabulary_coverage=vocabulary_coverage,
        tokens_per_second=earlier.tokens_per_second if earlier else result.tokens_per_second,
        dtype=result.dtype,
        seconds=earlier.seconds if earlier else time.monotonic() - started,
    )
    write_stage(run_path / TRAINING_NAME, summary)
    curves = read_curves(run_path / TENSORBOARD_FOLDER)
    write_run_page(run_path, curves)
    report.publish_table(
        f"Training: {title}",
        [*report.train_rows(summary), *report.where_a_run_is(run_path)],
        key=artifact_key("training", title),
    )
    drawn = loss_plot(curves)
    if drawn is not None:
        report.publish_plot(f"Loss: {title}", drawn[1], key=artifact_key("loss", title))
    return summary


def _earlier(run_path: Path, result: TrainingResult) -> TrainSummary | None:
    """Return what a run took that was done already, and None of one that this attempt moved."""
    found = RunRecord.read(run_path).training
    is_same = found is not None and found.num_steps == result.num_steps
    return found if is_same and not result.tokens_per_second else None


def _sound_setup(job: TrainJob, target: TargetConfig, store: Store) -> DraftSetup:
    """Return the untrained draft on the device of `target`, if the states may be trained on."""
    setup = set_up_draft(target, job.training, TokenFile(job.train_tokens), job.run_path)
    partial = partial_target(target, store.identity)
    recompute = TargetRecompute(setup.target_lm_head, partial)
    require_sound(store, store.snapshot(job.snapshot_id), recompute)
    return setup


def _require_devices(target: TargetConfig, num_processes: int) -> None:
    num_gpus = torch.cuda.device_count()
    if resolve_device(target.device).type == "cuda" and num_processes > max(num_gpus, 1):
        raise ConfigError(
            f"training.num_processes is {num_processes}, but this machine shows {num_gpus} GPUs "
            "(CUDA_VISIBLE_DEVICES counts): each process needs one of its own. Set it to "
            f"{max(num_gpus, 1)} at most"
        )


class _FirstRank:
    """The process that SIGTERM is passed on to, once, as soon as it has done a step."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._stop_asked = False

    def has_done_a_step(self, pid: int) -> None:
        self._pid = pid
        self._pass_on()

    def has_ended(self) -> None:
        self._pid = None

    def stop(self) -> None:
        self._stop_asked = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self._stop_asked and self._pid is not None:
            os.kill(self._pid, signal.SIGTERM)
            self._stop_asked = False


@contextmanager
def _stopped_by_sigterm() -> Iterator[_FirstRank]:
    """Yield who gets the SIGTERM of this process; outside the main thread there is none to get."""
    first_rank = _FirstRank()
    if threading.current_thread() is not threading.main_thread():
        yield first_rank
        return
    previous = signal.signal(signal.SIGTERM, lambda _signal, _frame: first_rank.stop())
    try:
        yield first_rank
    finally:
        signal.signal(signal.SIGTERM, previous)


def _train_ranks(
    job: TrainJob, on_progress: Callable[[Progress], None], *, title: str
) -> TrainingResult:
    """Train in several processes; the result is the first one's."""
    num_ranks = job.training.num_processes
    lines = ask_ranks(
        "flows.train_worker",
        job,
        num_ranks=num_ranks,
        environment=_rank_environment(job.target, num_ranks),
        what=f"training {title} in {num_ranks} processes (its last checkpoint is good: run the "
        "same command again to go on)",
    )
    result: TrainingResult | None = None
    try:
        with closing(lines), _stopped_by_sigterm() as first_rank:  # type: ignore[type-var]  # a generator
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
        if result is None:  # else all was done, and SIGTERM met processes that were ending
            raise
    assert result is not None  # noqa: S101 (the last thing that the first rank says)
    return result


def _rank_environment(target: TargetConfig, num_ranks: int) -> Mapping[str, str]:
    """Return what the environment of the ranks adds: they share the processors and one machine."""
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    chosen = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    wanted = {name: value for name, value in chosen.items() if name not in os.environ}
    if resolve_device(target.device).type == "cpu":
        wanted["CUDA_VISIBLE_DEVICES"] = ""  # they would meet on GPUs that they do not use
    return wanted
