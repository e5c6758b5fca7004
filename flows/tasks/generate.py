"""One task run = one batch of shards, computed by a child process that loads the target once.

A kernel kill or a device fault in the child loses its batch, never the flow run.
"""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from flows.orchestration.credentials import use_credentials
from flows.orchestration.retry import is_transient
from flows.reports.store_summaries import ShardResult
from flows.workers.pool import WorkerPool, shared_pool
from flows.workers.shard_batch import ShardBatch
from storage.store import Store


@task(
    task_run_name="shards {batch.first:05d}-{batch.last:05d}",
    retries=2,
    retry_delay_seconds=[2, 30],
    retry_condition_fn=is_transient,  # a corrupt shard or a wrong config is not retried
    cache_policy=NO_CACHE,  # only the commit records know what exists
    persist_result=False,
)
def generate_shards(batch: ShardBatch, pool: WorkerPool | None = None) -> tuple[ShardResult, ...]:
    """Compute the shards of `batch` in a child process; return the committed ones.

    Without a `pool`, the task runs on a cluster's worker, which has its own pool.

    Raises:
        ChildKilledError: the child died without a result, or hung and was killed (retried).
        ServerUnreachableError: a cluster's worker needs credentials from it (retried).
        EagleCoreError, StorageError: the error that the child reported.

    """
    attempt = task_run.run_count or 1
    may_have_run = attempt > 1 or pool is None  # a cluster repeats tasks whose results are lost
    if pool is None:
        pool = shared_pool()
        if use_credentials(batch.credentials):
            pool.renew()
    if may_have_run:
        batch = _rest(batch)
    if not batch.shard_ids:
        return ()
    results = tuple(
        ShardResult(
            planned_id=report.planned_id,
            shard_id=report.shard_id,
            excluded=report.excluded,
            seconds=report.seconds,
            attempt=attempt,
            worker=report.worker,
        )
        for report in pool.make(batch)
        if report.kind == "shard"
    )
    num_committed = sum(bool(result.shard_id) for result in results)
    get_run_logger().info("shards %d-%d: %d committed", batch.first, batch.last, num_committed)
    return results


def _rest(batch: ShardBatch) -> ShardBatch:
    """Return the part of a batch that is not committed."""
    committed = set(Store.open(batch.store_root).shard_ids())
    rest = tuple(shard_id for shard_id in batch.shard_ids if shard_id not in committed)
    return batch.model_copy(update={"shard_ids": rest})
