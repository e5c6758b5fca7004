"""One task run = one batch of shards, made by a child process that loads the target once.

A kernel kill or a device fault in the child costs its batch, never the flow run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.child_process import ask
from flows.retry import is_transient
from flows.shard_worker import ShardJob, ShardReport


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBatch:
    """The shards of one task run, and their places in the plan for a name a person can read."""

    first: int
    last: int
    job: ShardJob


@task(
    task_run_name="shards {batch.first:05d}-{batch.last:05d}",
    retries=2,
    retry_delay_seconds=[2, 30],
    retry_condition_fn=is_transient,  # a corrupt shard or a wrong config is not retried
    cache_policy=NO_CACHE,  # the commit record is the only truth about what exists
    persist_result=False,
)
def generate_shards(batch: ShardBatch, on_report: Callable[[ShardReport], None]) -> int:
    """Make the shards of `batch` in a child process; return how many were committed.

    Raises:
        ChildKilledError: the child died without an answer (retried).
        EagleCoreError, StorageError: what the child reported, as it raised it.

    """
    committed = 0
    what = f"the process of shards {batch.first}-{batch.last}"
    for line in ask("flows.shard_worker", batch.job, what=what):
        report = ShardReport.model_validate_json(line)
        committed += report.kind == "shard"
        on_report(report)
    return committed
