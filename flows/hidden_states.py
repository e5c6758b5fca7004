"""`hidden-states`: conversations in, a snapshot of the store out; only what is missing is made."""

import time

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import CorruptError
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.store_identity import store_identity
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.event_names import SNAPSHOT_PUBLISHED, store_resource
from flows.orchestration.events import send
from flows.orchestration.run_name import run_name
from flows.reports import rows as report
from flows.summaries import HiddenStatesSummary, TokensSummary
from flows.tasks.make_shards import MissingShards, make_shards
from flows.tasks.preflight import preflight, wanted_samples
from flows.tasks.prepare import prepare
from flows.workspace import DEFAULT_HOME, Workspace
from storage.store import Store


@flow(
    name="hidden-states",
    flow_run_name=run_name("hidden-states-{target.name}-{dataset.name}"),
    persist_result=False,
)
def hidden_states(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
    runner: RunnerConfig = RunnerConfig(),  # noqa: B008 (frozen)
    home: str = DEFAULT_HOME,
) -> HiddenStatesSummary:
    """Compute, store and publish the hidden states that the store does not hold yet.

    A retry, from the Prefect UI or by running it again, makes only shards without a commit record.

    Raises:
        DoesNotFitError: there is no room for the missing shards; none was made.
        CorruptError: more samples have states that are not finite than may be left out.
        MissingShardsError: some batches failed; everything else is committed and stays.

    """
    started = time.monotonic()
    space, tokens = prepare(target, dataset, home)
    root = store_root(store, space)
    preflight(target, store, tokens, root)
    work = plan_missing_shards(target, store, tokens, root)
    num_made = make_shards(target, store, runner, tokens, root, work)
    known = Store.open(root).snapshot_ids()
    summary = publish(tokens, space, root, shards_made=num_made, started=started)
    if summary.snapshot_id not in known:  # an automation would train the same once more
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


@task(task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def plan_missing_shards(
    target: TargetConfig, config: StoreConfig, tokens: TokensSummary, root: str
) -> MissingShards:
    """Open or create the store and return what it lacks.

    Raises:
        MismatchError: the store was made with another target, template or layers.

    """
    store = Store.create(root, store_identity(target, config, tokens))
    plan = store.plan(wanted_samples(tokens), shard_tokens=config.shard_tokens)
    missing = store.plans.missing(plan)
    get_run_logger().info(
        "%d samples wanted, %d shards to make (%s)",
        tokens.num_samples,
        len(missing),
        root,
    )
    return MissingShards(plan_id=plan.plan_id, shards=missing)


@task(task_run_name="publish snapshot", cache_policy=NO_CACHE, persist_result=False)
def publish(
    tokens: TokensSummary, space: Workspace, root: str, *, shards_made: int, started: float
) -> HiddenStatesSummary:
    """Publish the snapshots of both splits by name, training as the latest; return the bill."""
    store = Store.open(root)
    commits = store.commits()
    held_out = commits.usable(TokenFile(tokens.held_out_path).sample_ids)
    if held_out:
        # It keeps its shards from being collected as garbage.
        name = space.snapshot_name("held_out")
        store.publish(
            held_out, commits=commits, name=name, made_from=tokens.content, as_latest=False
        )
    train = commits.usable(TokenFile(tokens.train_path).sample_ids)
    if not train:
        raise CorruptError(
            f"none of {tokens.num_samples:,} samples has states that are finite and is not held "
            f"out; `eyas inspect {root}` says more"
        )
    name = space.snapshot_name("train")
    snapshot = store.publish(train, commits=commits, name=name, made_from=tokens.content)
    totals = commits.totals
    return HiddenStatesSummary(
        store_root=root,
        snapshot_id=snapshot.snapshot_id,
        profile=store.identity.profile,
        num_samples=totals.num_samples,
        num_tokens=totals.num_tokens,
        num_supervised_tokens=totals.num_supervised,
        num_shards=totals.num_shards,
        num_excluded=tokens.num_samples - len(train) - len(held_out),
        shards_made=shards_made,
        raw_bytes=totals.raw_bytes,
        stored_bytes=totals.stored_bytes,
        seconds=time.monotonic() - started,
    )
