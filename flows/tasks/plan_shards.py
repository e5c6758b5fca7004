"""Plans the missing shards of a store."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.target.config import TargetConfig
from flows.bridge.store_identity import store_identity
from flows.config.store import StoreConfig
from flows.summaries import TokensSummary
from flows.tasks.preflight import wanted_samples
from flows.workers.shard_batch import ShardPlan
from storage.store import Store


@task(task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def plan_missing_shards(
    target: TargetConfig, config: StoreConfig, tokens: TokensSummary, root: str
) -> ShardPlan:
    """Open or create the store and return its missing shards.

    Raises:
        MismatchError: the store was made with another target, template or layers.

    """
    store = Store.create(root, store_identity(target, config, tokens))
    plan = store.plan(wanted_samples(tokens), shard_tokens=config.shard_tokens)
    missing = store.plans.missing(plan)
    get_run_logger().info(
        "%d samples required, %d shards to compute (%s)",
        tokens.num_samples,
        len(missing),
        root,
    )
    return ShardPlan(plan_id=plan.plan_id, shards=missing)
