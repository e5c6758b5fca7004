"""`estimate`: acceptance from stored states on held-out data, without running the target."""

import time

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.estimate import AcceptanceEstimate, estimate_acceptance
from eagle_core.samples import HiddenStateSample
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_setup import DraftSetup
from flows.bridge.recompute import load_recompute_model
from flows.bridge.store_identity import as_in_store, open_store
from flows.bridge.stored_source import StoredSource
from flows.config.store import StoreConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_table
from flows.orchestration.best_effort import best_effort
from flows.orchestration.credentials import store_root
from flows.orchestration.progress import StageProgress, stage_progress
from flows.orchestration.run_name import run_name
from flows.reports import rows as report
from flows.reports.run_page import write_run_page
from flows.reports.run_record import ESTIMATE_NAME, write_stage
from flows.reports.table import print_table
from flows.summaries import EstimateSummary
from flows.tasks.trained_run import TrainedRun, open_run
from flows.workspace import DEFAULT_HOME, RunName, Workspace
from storage.reader import SnapshotReader
from storage.records.snapshot import Snapshot


@flow(
    name="estimate",
    flow_run_name=run_name("estimate-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def estimate_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    training: TrainingConfig = TrainingConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    home: str = DEFAULT_HOME,
    run: RunName = "main",
) -> EstimateSummary:
    """Replay held-out answers from the store with the draft of run `run`, greedily.

    Uses the same checkpoint as `evaluate` and `export`. Of `evaluation` it uses only `checkpoint`,
    `draft_tokens` and `num_prompts`, here the number of held-out samples; of the target it reads
    only embedding and head. `dataset` and `training` are used as in `evaluate`.

    Raises:
        ConfigError: there is no checkpoint, no store, or no held-out sample in it.
        MismatchError: the store or the checkpoint belongs to something else.

    """
    started = time.monotonic()
    root = store_root(store, Workspace.at(home, target=target.name, dataset=dataset.name))
    target = as_in_store(target, root)
    trained = open_run(target, dataset, training, home, run, evaluation.checkpoint)
    run_path = trained.path
    reader = _held_out(trained, store, root)
    setup, found = trained.load_draft()
    title = f"{target.name} on {dataset.name}, run {run}"
    summary = EstimateSummary(
        run_path=run_path,
        checkpoint_step=found.step,
        snapshot_id=reader.snapshot_id,
        estimate=_measure(
            setup, reader, load_recompute_model(target, reader.identity), evaluation, title=title
        ),
        seconds=time.monotonic() - started,
    )
    write_stage(run_path / ESTIMATE_NAME, summary)
    with best_effort("report.html"):
        write_run_page(run_path)
    rows = report.estimate_rows(summary)
    print_table(f"Estimated acceptance: {title}", rows)
    publish_table(
        f"Estimated acceptance: {title}",
        rows,
        key=artifact_key("estimate", target.name, dataset.name, run),
    )
    return summary


def _held_out(trained: TrainedRun, config: StoreConfig, root: str) -> SnapshotReader:
    """Return the held-out samples of the store, which must match this target and tokenizer."""
    opened = open_store(trained.target, config, root)
    held_out = trained.held_out().sample_ids
    if not held_out:
        raise ConfigError(
            "no samples were held out, so there is nothing to estimate on; set "
            "dataset.held_out_fraction above 0, then run the hidden-states flow"
        )
    commits = opened.commits()
    sample_ids = commits.usable(held_out)
    if not sample_ids:
        raise ConfigError(
            f"the store at {opened.root.url} excludes all {len(held_out):,} held-out samples: "
            f"their states are not finite (eyas inspect {opened.root.url})"
        )
    num_there = len(commits.held(sample_ids))
    if num_there < len(sample_ids):
        raise ConfigError(
            f"the store at {opened.root.url} holds {num_there:,} of {len(sample_ids):,} held-out "
            f"samples of run {trained.path.name}; run hidden-states with its data set first"
        )
    return opened.reader(Snapshot.of(sample_ids, commits))


def _measure(
    setup: DraftSetup,
    reader: SnapshotReader,
    recompute_model: RecomputeModel | None,
    evaluation: EvaluationConfig,
    *,
    title: str,
) -> AcceptanceEstimate:
    total = min(len(reader.lengths), evaluation.num_prompts)
    key = artifact_key("estimate", title)
    with stage_progress("estimate", key=key, total=total, unit="samples") as bar:
        return estimate_acceptance(
            setup.draft,
            _CountedSource(reader, recompute_model, bar),
            draft_tokens=evaluation.draft_tokens,
            num_samples=total,
        )


class _CountedSource(StoredSource):
    """Stored samples that advance a progress bar as they are read in order."""

    def __init__(
        self, reader: SnapshotReader, recompute_model: RecomputeModel | None, bar: StageProgress
    ) -> None:
        super().__init__(reader, recompute_model)
        self._bar = bar

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index`: all before it are done."""
        self._bar.move_to(index)
        return super().fetch(index)
