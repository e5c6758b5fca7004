"""`train`: trains a draft on the snapshot of its data, from the newest good checkpoint on."""

import dataclasses
import logging

import torch
from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.tracking.config import TrackingConfig
from eagle_core.tracking.trackers import require_trackers
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_setup import (
    VOCABULARY_NAME,
    DraftSetup,
    choose_vocabulary,
    require_start,
    set_up_draft,
)
from flows.bridge.recompute import TargetRecompute, load_recompute_model
from flows.bridge.run import Run, write_run
from flows.bridge.run_lock import RunLock, sole_training
from flows.bridge.semantic_probe import require_sound
from flows.bridge.store_identity import decided, open_store
from flows.config.run import RunConfig
from flows.config.store import StoreConfig
from flows.orchestration.credentials import store_root
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import print_stage
from flows.reports import rows as report
from flows.reports.run_record import (
    StorageSize,
    write_settings,
)
from flows.summaries import TrainSummary
from flows.tasks.attempt_length import attempt_length
from flows.tasks.decoding import decoding_of_run, require_decodable
from flows.tasks.other_machine import train_with_first
from flows.tasks.prepare import prepare_weights
from flows.tasks.run_training import run_attempt, run_training
from flows.tasks.training_data import TrainingData, held_by_run, training_data
from flows.workers.machines import is_first_machine, open_meeting
from flows.workers.ranks import train_ranks
from flows.workers.run_of_machines import RunOfMachines
from flows.workers.train_worker import TrainJob, open_sources
from flows.workspace import DEFAULT_HOME, RunName, Workspace
from storage.records.snapshot import Snapshot
from storage.store import Store

logger = logging.getLogger(__name__)


@flow(
    name="train",
    flow_run_name=run_name("train-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def train_flow(  # noqa: PLR0917 (one parameter per section of a recipe)
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    training: TrainingConfig = TrainingConfig(),
    tracking: TrackingConfig = TrackingConfig(),
    draft: DraftSettings = PLAIN_DRAFT,
    home: str = DEFAULT_HOME,
    run: RunName = "main",
    snapshot_id: str | None = None,
) -> TrainSummary:
    """Train the draft of run `run` on the snapshot of its data set, or on `snapshot_id`.

    With `training.nodes`, the machine that the rendezvous names does this. Each other waits for it,
    trains with it, and writes nothing.

    A run that has begun resumes from its newest checkpoint with its own snapshot, whatever was
    published since. It reads no data set, and ends in the same bits as an uninterrupted run.

    Raises:
        ConfigError: there is no store, states are missing, fewer GPUs than processes, no package
            for a tracker, or a target that cannot be decoded though `training.decode_every` is set.
        MismatchError: the store, the snapshot or the checkpoints belong to something else; or the
            run is longer than it was, and `training.extend` is not set.
        CorruptError: a shard does not reproduce the recorded log-probabilities.
        ChildKilledError: one of several processes died; the last checkpoint is good.
        MachinesApartError: several machines did not meet in time.
        RunBusyError: another process trains the same run; names it.
        TrainingStoppedError: SIGTERM stopped training; the checkpoint is written.

    """
    _require_devices(target, training.num_processes)
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    run_path = space.run_path(run)
    if not is_first_machine(training):
        title = f"{space.target}-{space.dataset}-{run}"
        return train_with_first(
            *(target, draft.with_moved(training.moved), training, run_path), title=title
        )
    require_trackers(tracking)
    require_start(training, run_path)
    prepare_weights(target)
    require_decodable(target, training)
    root = store_root(store, space)
    given, target = target, decided(target, Store.open(root).identity.target_fields)
    config = RunConfig(
        target=target,
        dataset=dataset,
        store=store,
        draft=draft.with_moved(training.moved),
        training=training,
        tracking=tracking,
        given_target=given,
    )
    opened = open_store(target, store, root)
    if snapshot_id is None and run in opened.snapshot_ids():
        snapshot_id = run  # automations of older versions name the run by its snapshot
    data = training_data(opened, config, space, run_path, snapshot_id=snapshot_id)
    opened.require_present(data.snapshot, commits=data.commits)
    if data.record:
        config = dataclasses.replace(config, dataset=data.record.dataset)
    job = TrainJob(
        target=target,
        draft=config.draft,
        training=training,
        tracking=tracking,
        title=config.title(run),
        store_root=root,
        snapshot_id=data.snapshot.snapshot_id,
        held_out_tokens=data.tokens.held_out_path,
        run_path=run_path,
        object_cache=None if opened.is_local else space.object_cache_path,
        object_cache_bytes=store.cache_bytes,
    )
    with (
        sole_training(run_path, nodes=training.nodes, rendezvous=training.rendezvous) as lock,
        held_by_run(opened, run_path, data),
    ):
        summary = _train(job, config, opened, data, lock)
    print_stage(
        f"Training: {config.title(run)}",
        [
            *report.train_rows(summary),
            *report.where_a_run_is(run_path),
            ("next", "eyas run evaluate RECIPE (or estimate, export)"),
        ],
    )
    return summary


def _train(
    job: TrainJob, config: RunConfig, store: Store, data: TrainingData, lock: RunLock
) -> TrainSummary:
    """Train in this process, or in several, and report; the run's folder is locked."""
    training, run_path = config.training, job.run_path
    lengths, groups = data.snapshot.lengths, data.snapshot.groups
    coverage = (
        data.record.coverage
        if data.record and (run_path / VOCABULARY_NAME).exists()
        else choose_vocabulary(
            *(config.target, training, TokenFile(data.tokens.train_path), run_path, config.draft)
        )
    )
    if data.record:
        data.record.require_vocabulary(run_path)
    is_single = training.world_size == 1
    here = config.target if is_single else config.target.model_copy(update={"device": "cpu"})
    setup = set_up_draft(here, training, run_path, config.draft)  # ranks need the first GPU empty
    draft = setup.draft.config
    length = attempt_length(run_path, training, draft, data.begun, lengths, groups)
    given = config.given_target or config.target
    decoding = decoding_of_run(given, training, draft, data.tokens.held_out_path)
    job = job.model_copy(
        update={"decoding": decoding, "coverage": coverage, "planned": length.planned}
    )
    _require_sound(setup, here, store, data.snapshot)
    record = Run.of(
        config,
        title=job.title,
        source_id=job.snapshot_id,
        store_root=job.store_root,
        tokens=data.tokens,
        setup=setup,
        coverage=coverage,
    )

    def write_record() -> None:
        write_run(run_path, record, begun=data.record)
        storage_size, excluded = StorageSize.of(store, data.commits), data.commits.excluded
        write_settings(
            run_path, record, data.tokens, storage_size, total_steps=length.total, excluded=excluded
        )

    if is_single:
        source, held_out = open_sources(job, data.commits)
        return run_training(
            *(setup, source, held_out, record, lock),
            length=length,
            write_record=write_record,
            decoding=decoding,
        )
    del setup
    meeting = open_meeting(training, lock)
    together = (
        RunOfMachines.here(job.title, given, job.draft, training, run_path) if meeting else None
    )
    return run_attempt(
        lambda on_progress: train_ranks(job, on_progress, meeting=meeting, run=together),
        *(run_path, record, lock),
        total=length.total,
        write_record=write_record,
    )


def _require_sound(
    setup: DraftSetup, target: TargetConfig, store: Store, snapshot: Snapshot
) -> None:
    recompute_model = load_recompute_model(target, store.identity)
    require_sound(store, snapshot, TargetRecompute(setup.target_lm_head, recompute_model))


def _require_devices(target: TargetConfig, num_processes: int) -> None:
    num_gpus = torch.cuda.device_count()
    if resolve_device(target.device).type == "cuda" and num_processes > max(num_gpus, 1):
        raise ConfigError(
            f"training.num_processes is {num_processes}, but this machine shows {num_gpus} GPUs "
            "(CUDA_VISIBLE_DEVICES counts): each process needs its own. Set it to "
            f"{max(num_gpus, 1)} at most"
        )
