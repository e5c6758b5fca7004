"""`online`: the same training on states that the target computes; stored only with `store.keep`."""

import dataclasses
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.capture import CapturingTarget
from eagle_core.target.config import TargetConfig
from eagle_core.target.fingerprint import fingerprint, fingerprint_fields
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import for_decoding
from eagle_core.target.placement import load_decoding_target, load_target
from eagle_core.target.weights import locate
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.tracking.config import TrackingConfig
from eagle_core.tracking.trackers import require_trackers
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_setup import DraftSetup, choose_vocabulary, require_start, set_up_draft
from flows.bridge.keep_online_states import StateKeeper
from flows.bridge.online_source import OnlineSource
from flows.bridge.recompute import TargetRecompute, load_recompute_model
from flows.bridge.run import Run, begun_run, write_run
from flows.bridge.run_lock import sole_training
from flows.bridge.store_identity import as_in_store, decided, store_identity
from flows.bridge.token_files import current_content
from flows.config.run import RunConfig
from flows.config.store import StoreConfig
from flows.evaluate import evaluate_flow
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_table
from flows.orchestration.credentials import store_root
from flows.orchestration.run_name import run_name
from flows.reports import rows as report
from flows.reports.run_record import StorageSize, write_settings
from flows.reports.table import print_table
from flows.summaries import OnlineSummary, TokensSummary, TrainSummary
from flows.tasks.attempt_length import attempt_length
from flows.tasks.decoding import decoding_of_run, require_decodable
from flows.tasks.preflight import preflight
from flows.tasks.prepare import (
    check_runnable,
    is_evaluated,
    prepare,
    prepare_weights,
    tokens_of_run,
)
from flows.tasks.run_training import run_training
from flows.tasks.training_data import own_dataset, was_replaced
from flows.workspace import DEFAULT_HOME, RunName, Workspace
from storage.store import Store


@flow(
    name="online",
    flow_run_name=run_name("online-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def online(  # noqa: PLR0917 (one parameter per section of a recipe)
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    training: TrainingConfig = TrainingConfig(),
    tracking: TrackingConfig = TrackingConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    draft: DraftSettings = PLAIN_DRAFT,
    home: str = DEFAULT_HOME,
    run: RunName = "online",
) -> OnlineSummary:
    """Train while the target computes the hidden states, then evaluate.

    A target that this machine cannot decode, such as a streamed one, is not evaluated.

    Nothing is stored, and of `store` only `shard_tokens` matters: how many tokens the target
    computes at a time. With `store.keep` the states are stored as they are computed: the second
    epoch and every later run read them.

    Raises:
        ConfigError: several processes or machines are requested, or the package of a tracker is not
            installed.
        DoesNotFitError: with `store.keep`, there is no room for the states.
        MismatchError: the data set was replaced since the run began, or the run is finished and
            its data set has changed.
        RunBusyError: another process trains the same run; names it.
        MismatchError: with `store.keep`, the store was made with something else; or the run is
            longer than it was, and `training.extend` is not set.
        TrainingStoppedError: SIGTERM stopped training; the checkpoint is written.

    """
    started = time.monotonic()
    if training.num_processes > 1:
        raise ConfigError(
            f"training.num_processes is {training.num_processes}, but online training uses one "
            "process: each would load its own target. Set training.num_processes=1, or run the "
            "offline flow, where several processes read stored states"
        )
    if training.nodes > 1:
        raise ConfigError(
            f"training.nodes is {training.nodes}, but online training uses one machine. Set "
            "training.nodes=1, or run the offline flow, where several machines read stored states"
        )
    require_trackers(tracking)
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    require_start(training, space.run_path(run))
    config = RunConfig(
        target=target,
        dataset=dataset,
        store=store,
        draft=draft.with_moved(training.moved),
        training=training,
        tracking=tracking,
    )
    prepare_weights(target)
    is_decoded = is_evaluated(target, evaluation)
    trained = _train(config, space, run, rolls_back=is_decoded and evaluation.engine == "eyas")
    acceptance = (
        evaluate_flow(
            target=target,
            dataset=dataset,
            training=training,
            evaluation=evaluation,
            home=home,
            run=run,
        )
        if is_decoded
        else None
    )
    summary = OnlineSummary(
        training=trained, acceptance=acceptance, seconds=time.monotonic() - started
    )
    rows = report.online_rows(summary)
    title = f"Eyas: {target.name} on {dataset.name}, online"
    print_table(title, [*rows, *report.where_to_look(trained.run_path)])
    publish_table(title, rows, key=artifact_key("online", target.name, dataset.name, run))
    return summary


def _train(config: RunConfig, space: Workspace, run: str, *, rolls_back: bool) -> TrainSummary:
    """Train on states that the target computes, and publish them if they are kept."""
    training, run_path = config.training, space.run_path(run)
    begun = begun_run(run_path)
    root = store_root(config.store, space) if config.store.keep else None
    target = _decided(config.target, begun.record if begun else None, root)
    config = dataclasses.replace(config, target=target, given_target=config.target)
    max_length = None if begun else config.dataset.max_length
    rolls_back = rolls_back and not training.decode_every
    check_runnable(target, max_length=max_length, rolls_back=rolls_back)  # evaluation comes last
    require_decodable(target, training, max_length=max_length, captured="here")
    known = begun.record if begun else None
    given = config.dataset
    if begun:  # the data set is not read again
        config = dataclasses.replace(config, dataset=own_dataset(known, given, run_path))
        tokens = tokens_of_run(target, config.dataset, space, run_path.name, begun.tokens)
        _compare_with_now(target, config.dataset, space, run_path, tokens)
    else:
        tokens = prepare(target, given, str(space.home))[1]
    train_tokens = TokenFile(tokens.train_path)
    with ExitStack() as stack:
        lock = stack.enter_context(sole_training(run_path))
        coverage = choose_vocabulary(target, training, train_tokens, run_path, config.draft)
        setup = set_up_draft(target, training, run_path, config.draft)
        keeper = None
        if root is not None:
            keeper = stack.enter_context(_keeper(config, root, tokens, setup))
        source = OnlineSource(
            lambda: _target(config),
            train_tokens,
            group_tokens=config.store.shard_tokens,
            groups_kept=training.shuffle_window,
            target_fingerprint=fingerprint(fingerprint_fields(target, locate(target))),
            keeper=keeper,
        )
        if setup.refit is not None:  # by the same target: two may not fit
            refit = dataclasses.replace(setup.refit, load_target=source.target)
            setup = dataclasses.replace(setup, refit=refit)
        record = Run.of(
            config,
            title=config.title(run),
            source_id=source.source_id,
            store_root=root,
            tokens=tokens,
            setup=setup,
            coverage=coverage,
        )
        decoding = decoding_of_run(
            config.given_target or target, training, setup.draft.config, tokens.held_out_path
        )
        length = attempt_length(
            *(run_path, training, setup.draft.config, begun, source.lengths, source.groups)
        )
        if begun and begun.step >= length.total:
            _require_same_data(begun.tokens, target, given, str(space.home), run_path)

        def write_record() -> None:
            write_run(run_path, record, begun=known)
            storage_size = None if keeper is None else StorageSize.of(keeper.store)
            write_settings(run_path, record, tokens, storage_size, total_steps=length.total)

        trained = run_training(
            setup,
            source,
            None,
            record,
            lock,
            length=length,
            write_record=write_record,
            refetch_samples=False,
            decoding=decoding,
            decoding_target=None if decoding is None else partial(_shared, source, decoding.target),
        )
        source.release_target()  # evaluation loads it again: two may not fit
        if keeper is not None:
            _publish(keeper, space.snapshot_name("train"), tokens.content)
            write_record()  # with the current size of the states
    return trained


def _decided(target: TargetConfig, known: Run | None, root: str | None) -> TargetConfig:
    """Return a target as the run or the store has it, where its settings leave that open."""
    if known is not None:
        return decided(target, known.target_fields)
    return decided(target, {}) if root is None else as_in_store(target, root)


def _target(config: RunConfig) -> CapturingTarget:
    target = load_target(config.target)
    if target.pass_tokens > 1:
        get_run_logger().warning(
            "target %s is streamed: all its weights are read again for every %s tokens; raise "
            "store.shard_tokens, and keep the states for later epochs (store.keep=true); if the "
            "device runs out of memory in a later step, set target.stream_tokens",
            *(config.target.name, f"{min(target.pass_tokens, config.store.shard_tokens):,}"),
        )
    return target


def _shared(source: OnlineSource, decoded: TargetConfig) -> TargetModel:
    """Return the target to decode with: the one that computes the states, if it has the dtype."""
    target = source.target()
    if isinstance(target, TargetModel) and target.config.dtype == for_decoding(decoded).dtype:
        return target
    return load_decoding_target(decoded)


def _compare_with_now(
    target: TargetConfig,
    dataset: DatasetConfig,
    space: Workspace,
    run_path: Path,
    own: TokensSummary,
) -> None:
    """Warn if the data set was rebuilt since a run began; refuse if it was replaced."""
    content = current_content(target, dataset, space)
    if content in {None, own.content}:
        return
    what = f"run {run_path.name} trains on data set {dataset.name} as it was when the run began"
    now = space.token_file("train", str(content))
    if now.exists():
        before, after = (set(TokenFile(path).sample_ids) for path in (own.train_path, now))
        num_shared = len(before & after)
        what = f"{what}; the current data set has {num_shared:,} of its {len(before):,} samples"
        if was_replaced(len(before), len(after), num_shared=num_shared):
            raise MismatchError(
                f"{what}. If the data was replaced, train another run (--run), or delete this "
                "run's folder to start over"
            )
    get_run_logger().warning("%s; it continues with its own data", what)


def _require_same_data(
    content: str, target: TargetConfig, dataset: DatasetConfig, home: str, run_path: Path
) -> None:
    """Raise MismatchError if the data set of a finished run has changed."""
    if prepare(target, dataset, home)[1].content != content:
        raise MismatchError(
            f"run {run_path.name} has done its steps, and data set {dataset.name} or its settings "
            "have changed since: train another run (--run), which may start from this run's "
            "draft (training.start)"
        )


def _keeper(config: RunConfig, root: str, tokens: TokensSummary, setup: DraftSetup) -> StateKeeper:
    """Return the keeper for the store at `root`, if there is room for the states."""
    preflight(config.target, config.store, tokens, root)
    store = Store.create(root, store_identity(config.target, config.store, tokens))
    recompute_model = load_recompute_model(config.target, store.identity)
    keeper = StateKeeper(
        store,
        TokenFile(tokens.train_path).sample_ids,
        TargetRecompute(setup.target_lm_head, recompute_model),
        recompute_model,
        shards_in_memory=config.training.shuffle_window,
    )
    get_run_logger().info(
        "states are kept in %s: %d samples to compute", store.root.url, keeper.num_missing
    )
    return keeper


def _publish(keeper: StateKeeper, name: str, content: str) -> None:
    snapshot = keeper.publish(name, made_from=content)
    log = get_run_logger()
    if snapshot is None:
        log.info("%d samples were not reached and have no states yet", keeper.num_missing)
    else:
        log.info("all states are kept: snapshot %s", snapshot.snapshot_id)
