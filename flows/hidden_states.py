"""`hidden-states`: conversations in, a snapshot of the store out; computes only what is missing."""

import time
from typing import Literal

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.bridge.store_identity import as_in_store, store_identity
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.event_names import SNAPSHOT_PUBLISHED, store_resource
from flows.orchestration.events import send
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports import rows as report
from flows.summaries import HiddenStatesSummary
from flows.tasks.make_shards import make_shards
from flows.tasks.plan_shards import plan_missing_shards
from flows.tasks.preflight import preflight
from flows.tasks.prepare import prepare
from flows.tasks.publish import publish
from flows.workspace import DEFAULT_HOME
from storage.store import Store


@flow(
    name="hidden-states",
    flow_run_name=run_name("hidden-states-{target.name}-{dataset.name}"),
    persist_result=False,
)
def hidden_states(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    runner: RunnerConfig = RunnerConfig(),
    home: str = DEFAULT_HOME,
) -> HiddenStatesSummary:
    """Compute, store and publish the hidden states that the store does not hold yet.

    A retry, from the Prefect UI or as a new run, computes only shards without a commit record.

    Raises:
        ConfigError: the target cannot be run, such as for its architecture; nothing was tokenised.
        DoesNotFitError: there is no room for the missing shards; none was computed.
        MismatchError: the store was made with another target, template or layers.
        CorruptError: more samples have non-finite states than may be excluded.
        MissingShardsError: some batches failed; everything else is committed and stays.

    """
    started = time.monotonic()
    place: Literal["here", "on workers"] = "here" if runner.kind == "processes" else "on workers"
    space, tokens = prepare(target, dataset, home, capture=place)
    root = store_root(store, space)
    target = as_in_store(target, root, elsewhere=place == "on workers")
    preflight(target, store, tokens, root, runner)
    opened = Store.create(root, store_identity(target, store, tokens))
    plan = plan_missing_shards(opened, tokens, shard_tokens=store.shard_tokens)
    num_made = make_shards(opened, plan, target, store, runner, tokens)
    known = opened.snapshot_ids()
    summary = publish(opened, tokens, space, shards_made=num_made, started=started)
    if summary.snapshot_id not in known:  # an automation would train on it again
        send(
            SNAPSHOT_PUBLISHED,
            resource=store_resource(target.name, dataset.name),
            payload={"snapshot_id": summary.snapshot_id, "shards_made": summary.shards_made},
        )
    report_stage(
        f"Hidden states: {target.name} on {dataset.name}",
        report.hidden_states_rows(summary),
        key=artifact_key("hidden-states", target.name, dataset.name),
        following=[("next", "eyas run train RECIPE")],
    )
    return summary
