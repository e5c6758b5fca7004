"""`train`: a draft from the latest snapshot, resumed from the newest good checkpoint."""

import time

from prefect import flow

from eagle_core.dataset_config import DatasetConfig
from eagle_core.samples import SampleSource
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from eagle_core.trackers import TensorBoardTracker
from eagle_core.trainer import Progress, train
from eagle_core.training_config import TrainingConfig
from flows import report
from flows.artifact_key import artifact_key
from flows.config import StoreConfig
from flows.draft_setup import DraftSetup, set_up_draft
from flows.errors import TrainingStoppedError
from flows.identity import store_identity
from flows.prepare import prepare
from flows.progress import stage_progress
from flows.semantic_probe import recompute_with, require_sound
from flows.stored_source import StoredSource
from flows.summaries import TrainSummary
from flows.workspace import DEFAULT_HOME
from storage.snapshot import Snapshot
from storage.store import Store


@flow(
    name="train",
    flow_run_name="train-{target.name}-{dataset.name}-{run}",
    persist_result=False,
)
def train_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
    training: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    home: str = DEFAULT_HOME,
    run: str = "main",
) -> TrainSummary:
    """Train the draft of run `run` from the store's latest snapshot.

    A retry goes on from the newest checkpoint and ends in the same bits as an undisturbed run.

    Raises:
        ConfigError: there is no store or no snapshot yet.
        MismatchError: the store, the snapshot or the checkpoints belong to something else.
        CorruptError: a shard does not hold what the target said.
        TrainingStoppedError: SIGTERM ended it; the checkpoint is written.

    """
    space, tokens = prepare(target, dataset, home)
    root = store.root or str(space.store_root)
    Store.open(root)  # a clear error when there is none, rather than an empty new one
    opened = Store.create(root, store_identity(target, store, tokens))
    commits = opened.commits()
    # Samples are shuffled inside a window of shards: with less memory than that, every sample would
    # cost the decoding of its whole shard.
    largest_shard = max((commit.raw_bytes for commit in commits.values()), default=0)
    cache_bytes = training.shuffle_window * largest_shard
    snapshot = opened.snapshot()
    source = StoredSource(opened.reader(snapshot, cache_bytes=cache_bytes))
    held_out_ids = TokenFile(tokens.held_out_path).sample_ids
    held_out = None
    if held_out_ids:
        held_out = StoredSource(opened.reader(Snapshot.of(held_out_ids, commits)))
    setup = set_up_draft(target, training, TokenFile(tokens.train_path), space.run_path(run))
    require_sound(opened, snapshot, recompute_with(setup.target_lm_head))
    return run_training(
        training, setup, source, held_out, title=f"{target.name}-{dataset.name}-{run}"
    )


def run_training(
    training: TrainingConfig,
    setup: DraftSetup,
    source: SampleSource,
    held_out: SampleSource | None,
    *,
    title: str,
) -> TrainSummary:
    """Train from any source; the one piece of code behind the offline and the online flow."""
    started = time.monotonic()
    total = training.total_steps(int(source.lengths.sum()))
    with (
        stage_progress(
            "training", key=artifact_key("train", title), total=total, unit="steps"
        ) as bar,
        TensorBoardTracker(setup.run_path / "tensorboard") as tracker,
    ):

        def on_progress(progress: Progress) -> None:
            bar.move_to(progress.step, note=f"loss {progress.loss:.3f}")

        result = train(
            config=training,
            draft=setup.draft,
            target_lm_head=setup.target_lm_head,
            source=source,
            held_out=held_out,
            run_path=setup.run_path,
            tracker=tracker,
            on_progress=on_progress,
        )
    if result.stopped:
        raise TrainingStoppedError(
            f"training {title} was stopped at step {result.num_steps} of about {total} by SIGTERM; "
            f"nothing is lost ({result.checkpoint_path} is written): run the same command again, "
            "or press Retry in the Prefect UI, to go on from there"
        )
    summary = TrainSummary(
        run_path=setup.run_path,
        source_id=source.source_id,
        num_steps=result.num_steps,
        figures=result.figures,
        vocabulary_coverage=setup.vocabulary_coverage,
        tokens_per_second=result.tokens_per_second,
        seconds=time.monotonic() - started,
    )
    report.publish_table(
        f"Training: {title}", report.train_rows(summary), key=artifact_key("training", title)
    )
    return summary
