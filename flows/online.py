"""`online`: the same training with the target as the source of the states; no storage stage."""

import time
from pathlib import Path

from prefect import flow

from eagle_core.dataset_config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.evaluation import EvaluationConfig
from eagle_core.hosted_trackers import TrackingConfig, require_trackers
from eagle_core.target import TargetModel, fingerprint, fingerprint_fields
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from eagle_core.training_config import TrainingConfig
from eagle_core.weights import locate
from flows import report
from flows.artifact_key import artifact_key
from flows.config import StoreConfig
from flows.draft_setup import set_up_draft
from flows.evaluate import evaluate_flow
from flows.online_source import OnlineSource
from flows.prepare import prepare
from flows.run_record import write_settings
from flows.summaries import OnlineSummary
from flows.table import print_table
from flows.train import run_training
from flows.workspace import DEFAULT_HOME


@flow(
    name="online",
    flow_run_name="online-{target.name}-{dataset.name}-{run}",
    persist_result=False,
)
def online(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
    training: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    tracking: TrackingConfig = TrackingConfig(),  # noqa: B008 (frozen)
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
    home: str = DEFAULT_HOME,
    run: str = "online",
) -> OnlineSummary:
    """Train while the target computes the hidden states, then evaluate; nothing is stored.

    Only `store.shard_tokens` matters here: how many tokens the target computes at a time.

    Raises:
        ConfigError: several processes are asked for, or no package for a tracker is installed.
        TrainingStoppedError: SIGTERM ended it; the checkpoint is written.

    """
    started = time.monotonic()
    if training.num_processes > 1:
        raise ConfigError(
            f"training.num_processes is {training.num_processes}, but online training has one "
            "process: each would load the target for itself. Set training.num_processes=1, or run "
            "the offline flow, where several processes read stored states"
        )
    require_trackers(tracking)
    space, tokens = prepare(target, dataset, home)
    train_tokens = TokenFile(tokens.train_path)
    setup = set_up_draft(target, training, train_tokens, space.run_path(run))
    source = OnlineSource(
        TargetModel.load(target),
        train_tokens,
        group_tokens=store.shard_tokens,
        groups_kept=training.shuffle_window,
        target_fingerprint=fingerprint(fingerprint_fields(target, locate(target))),
    )
    title = f"{target.name}-{dataset.name}-{run}"
    write_settings(
        setup.run_path,
        tokens,
        {"target": target, "dataset": dataset, "training": training, "tracking": tracking},
        title=title,
        source_id=source.source_id,
        bill=None,
    )
    trained = run_training(training, tracking, setup, source, None, title=title)
    acceptance = evaluate_flow(
        target=target, dataset=dataset, training=training, evaluation=evaluation, home=home, run=run
    )
    summary = OnlineSummary(
        training=trained, acceptance=acceptance, seconds=time.monotonic() - started
    )
    rows = report.online_rows(summary)
    title = f"Eyas: {target.name} on {dataset.name}, online"
    print_table(title, [*rows, *report.where_to_look(trained.run_path, Path(home))])
    report.publish_table(title, rows, key=artifact_key("online", target.name, dataset.name, run))
    return summary
