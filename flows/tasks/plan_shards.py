"""Plans the missing shards of a store."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from flows.summaries import TokensSummary
from flows.tasks.preflight import wanted_samples
from flows.workers.shard_batch import ShardPlan
from storage.store import Store


@task(task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def plan_missing_shards(store: Store, tokens: TokensSummary, *, shard_tokens: int) -> ShardPlan:
    """Return the missing shards of the store."""
    plan = store.plan(wanted_samples(tokens), shard_tokens=shard_tokens)
    missing = store.plans.missing(plan)
    get_run_logger().info(
        "%d samples required, %d shards to compute (%s)",
        tokens.num_samples,
        len(missing),
        store.root.url,
    )
    return ShardPlan(plan_id=plan.plan_id, shards=missing)
