"""`offline`: hidden states, training, estimate and evaluation in one flow."""

import math
import time

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.target.preflight import CapturedWhere
from eagle_core.tracking.config import TrackingConfig
from eagle_core.tracking.trackers import require_trackers
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_setup import require_start, require_start_fits
from flows.bridge.run import begun_run
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.estimate import estimate_flow
from flows.evaluate import evaluate_flow
from flows.hidden_states import hidden_states
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_table
from flows.orchestration.run_name import run_name
from flows.reports import rows as report
from flows.reports.table import print_table
from flows.summaries import OfflineSummary
from flows.tasks.decoding import require_decodable
from flows.tasks.other_machine import train_with_first
from flows.tasks.prepare import check_runnable, is_evaluated, prepare_weights
from flows.train import train_flow
from flows.workers.machines import is_first_machine
from flows.workspace import DEFAULT_HOME, RunName, Workspace


@flow(
    name="offline",
    flow_run_name=run_name("offline-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def offline(  # noqa: PLR0917 (one parameter per section of a recipe)
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    runner: RunnerConfig = RunnerConfig(),
    training: TrainingConfig = TrainingConfig(),
    tracking: TrackingConfig = TrackingConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    draft: DraftSettings = PLAIN_DRAFT,
    home: str = DEFAULT_HOME,
    run: RunName = "main",
) -> OfflineSummary:
    """Train a draft from conversations, and measure its acceptance length.

    A target that this machine cannot decode, such as a streamed one, is not evaluated: the estimate
    from stored states says what the draft is worth.

    With `training.nodes`, the machine that the rendezvous names does this. Each other waits until
    the first one trains, however long that takes, and trains with it.

    Every stage checks what exists: a retry repeats no finished work. Only the first stage reads the
    data set; the others use its snapshot, or the run's own if the run has begun.
    """
    started = time.monotonic()
    run_path = Workspace.at(home, target=target.name, dataset=dataset.name).run_path(run)
    if not is_first_machine(training):
        title = f"{target.name}-{dataset.name}-{run}"
        trained = train_with_first(
            *(target, draft.with_moved(training.moved), training, run_path),
            title=title,
            limit_seconds=math.inf,
        )
        return OfflineSummary(
            states=None,
            training=trained,
            estimate=None,
            acceptance=None,
            seconds=time.monotonic() - started,
        )
    require_trackers(tracking)  # fail now, not after hours of hidden states
    require_start(training, run_path)
    prepare_weights(target)
    require_start_fits(target, training, run_path, draft.with_moved(training.moved))
    # Of all stages together: evaluation comes last.
    is_decoded = is_evaluated(target, evaluation)
    captured: CapturedWhere = "here" if runner.kind == "processes" else "on workers"
    check_runnable(
        target,
        max_length=dataset.max_length,
        rolls_back=is_decoded and evaluation.engine == "eyas" and not training.decode_every,
        captured=captured,
    )
    require_decodable(target, training, max_length=dataset.max_length, captured=captured)
    states = hidden_states(target=target, dataset=dataset, store=store, runner=runner, home=home)
    trained = train_flow(
        target=target,
        dataset=dataset,
        store=store,
        draft=draft,
        training=training,
        tracking=tracking,
        home=home,
        run=run,
        snapshot_id=None if begun_run(run_path) else states.snapshot_id,
    )
    estimate = None
    if trained.figures.held_out_step:  # samples are held out
        estimate = estimate_flow(
            target=target,
            dataset=dataset,
            store=store,
            training=training,
            evaluation=evaluation,
            home=home,
            run=run,
        )
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
    summary = OfflineSummary(
        states=states,
        training=trained,
        estimate=estimate,
        acceptance=acceptance,
        seconds=time.monotonic() - started,
    )
    rows = report.offline_rows(summary)
    title = f"Eyas: {target.name} on {dataset.name}, offline"
    print_table(title, [*rows, *report.where_to_look(trained.run_path)])
    publish_table(title, rows, key=artifact_key("offline", target.name, dataset.name, run))
    return summary
