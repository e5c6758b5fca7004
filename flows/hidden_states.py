"""`hidden-states`: conversations in, a snapshot of the store out; only what is missing is made."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from eagle_core.dataset_config import DatasetConfig
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from flows import report
from flows.artifact_key import artifact_key
from flows.config import StoreConfig
from flows.errors import MissingShardsError
from flows.event_names import SNAPSHOT_PUBLISHED, store_resource
from flows.events import send
from flows.generate import ShardBatch, generate_shards
from flows.identity import store_identity
from flows.preflight import preflight, wanted_samples
from flows.prepare import prepare
from flows.progress import StageProgress, stage_progress
from flows.shard_worker import ShardJob, ShardReport
from flows.store_root import store_root
from flows.summaries import HiddenStatesSummary, TokensSummary
from flows.workspace import DEFAULT_HOME
from storage.plan import PlannedShard
from storage.store import Store


@flow(
    name="hidden-states",
    flow_run_name="hidden-states-{target.name}-{dataset.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]  # generic in its future
    persist_result=False,
)
def hidden_states(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
    home: str = DEFAULT_HOME,
) -> HiddenStatesSummary:
    """Compute, store and publish the hidden states that the store does not hold yet.

    A retry, from the Prefect UI or by running it again, makes only shards without a commit record.

    Raises:
        DoesNotFitError: there is no room for the missing shards; none was made.
        MissingShardsError: some batches failed; everything else is committed and stays.

    """
    started = time.monotonic()
    space, tokens = prepare(target, dataset, home)
    root = store_root(store, space)
    preflight(target, store, tokens, root)
    work = plan_missing_shards(target, store, tokens, root)
    make_shards(target, store, tokens, root, work)
    summary = publish(tokens, root, shards_made=len(work.shards), started=started)
    send(
        SNAPSHOT_PUBLISHED,
        resource=store_resource(target.name, dataset.name),
        payload={"snapshot_id": summary.snapshot_id, "shards_made": summary.shards_made},
    )
    report.publish_table(
        f"Hidden states: {target.name} on {dataset.name}",
        report.hidden_states_rows(summary),
        key=artifact_key("hidden-states", target.name, dataset.name),
    )
    return summary


@dataclass(frozen=True, kw_only=True, slots=True)
class MissingShards:
    """The shards of a plan that have no commit record."""

    plan_id: str
    shards: tuple[PlannedShard, ...]


@task(task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def plan_missing_shards(
    target: TargetConfig, config: StoreConfig, tokens: TokensSummary, root: str
) -> MissingShards:
    """Open or create the store and return what it lacks.

    Raises:
        MismatchError: the store was made with another target, template or layers.

    """
    store = Store.create(root, store_identity(target, config, tokens))
    wanted = list(wanted_samples(tokens))
    plan = store.plan(wanted, shard_tokens=config.shard_tokens)
    missing = store.missing_shards(plan)
    get_run_logger().info(
        "%d samples wanted, %d shards to make (%s)", len(wanted), len(missing), root
    )
    return MissingShards(plan_id=plan.plan_id, shards=missing)


def make_shards(
    target: TargetConfig,
    config: StoreConfig,
    tokens: TokensSummary,
    root: str,
    work: MissingShards,
) -> None:
    """Run one task per batch of shards, wait for all of them, then name what is missing.

    Raises:
        MissingShardsError: some batches failed; everything else is committed and stays.

    """
    total = sum(shard.num_tokens for shard in work.shards)
    key = artifact_key("hidden-states-progress", target.name)
    with stage_progress("hidden states", key=key, total=total, unit="tokens") as progress:
        futures = [
            generate_shards.submit(batch, on_report=_advance(progress))
            for batch in _batches(target, config, tokens, root, work)
        ]
        wait(futures)
    _require_all(futures, work, Store.open(root))


def _advance(progress: StageProgress) -> Any:  # noqa: ANN401 (a closure Prefect passes through)
    def on_report(shard_report: ShardReport) -> None:
        progress.advance(shard_report.tokens, note=shard_report.shard_id[:8])

    return on_report


def _batches(
    target: TargetConfig,
    config: StoreConfig,
    tokens: TokensSummary,
    root: str,
    work: MissingShards,
) -> Iterator[ShardBatch]:
    for first in range(0, len(work.shards), config.shards_per_task):
        members = work.shards[first : first + config.shards_per_task]
        job = ShardJob(
            target=target,
            store_root=root,
            plan_id=work.plan_id,
            shard_ids=tuple(shard.shard_id for shard in members),
            token_files=(tokens.train_path, tokens.held_out_path),
        )
        yield ShardBatch(first=first, last=first + len(members) - 1, job=job)


def _require_all(futures: Sequence[PrefectFuture[int]], work: MissingShards, store: Store) -> None:
    committed = set(store.shard_ids())
    missing = [shard.shard_id for shard in work.shards if shard.shard_id not in committed]
    for future in futures:
        if future.state.is_failed() and missing:
            future.result()  # one cause, with its own type and message: usually the same for all
    if missing:
        raise MissingShardsError(
            f"{len(missing)} of {len(work.shards)} shards are missing: {', '.join(missing[:5])}; "
            "the others are committed. Press Retry in the Prefect UI, or run the flow again, to "
            "make only these"
        )


@task(task_run_name="publish snapshot", cache_policy=NO_CACHE, persist_result=False)
def publish(
    tokens: TokensSummary, root: str, *, shards_made: int, started: float
) -> HiddenStatesSummary:
    """Publish the snapshots of both splits, training last, and return the store's bill."""
    store = Store.open(root)
    commits = store.commits()
    held_out = TokenFile(tokens.held_out_path).sample_ids
    if held_out:
        store.publish(held_out, commits=commits)  # keeps its shards from being collected as garbage
    snapshot = store.publish(TokenFile(tokens.train_path).sample_ids, commits=commits)
    return HiddenStatesSummary(
        store_root=root,
        snapshot_id=snapshot.snapshot_id,
        profile=store.identity.profile,
        num_samples=sum(len(commit.sample_ids) for commit in commits.values()),
        num_tokens=sum(commit.num_tokens for commit in commits.values()),
        num_supervised_tokens=sum(commit.num_supervised for commit in commits.values()),
        num_shards=len(commits),
        shards_made=shards_made,
        raw_bytes=sum(commit.raw_bytes for commit in commits.values()),
        stored_bytes=sum(commit.stored_bytes for commit in commits.values()),
        seconds=time.monotonic() - started,
    )
