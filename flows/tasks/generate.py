"""One task run = one batch of shards, made by a child process that loads the target once.

A kernel kill or a device fault in the child costs its batch, never the flow run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from flows.orchestration.credentials import use_credentials
from flows.orchestration.retry import is_transient
from flows.workers.made_shard import MadeShard
from flows.workers.pool import ShardProcesses, kept_processes
from flows.workers.shard_worker import ShardJob, ShardReport
from storage.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBatch:
    """The shards of one task run, and their places in the plan for a name a person can read."""

    first: int
    last: int
    job: ShardJob
    silence_seconds: float
    """A process that says nothing for so long is killed."""
    credentials: str | None = None
    """The block that opens the store, where a task runs on another machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Here:
    """What a task uses in the flow's own process, and nowhere else: nothing of it can travel."""

    processes: ShardProcesses
    on_report: Callable[[ShardReport], None]


@task(
    task_run_name="shards {batch.first:05d}-{batch.last:05d}",
    retries=2,
    retry_delay_seconds=[2, 30],
    retry_condition_fn=is_transient,  # a corrupt shard or a wrong config is not retried
    cache_policy=NO_CACHE,  # the commit record is the only truth about what exists
    persist_result=False,
)
def generate_shards(batch: ShardBatch, here: Here | None = None) -> tuple[MadeShard, ...]:
    """Make the shards of `batch` in a child process; return those that were committed.

    Without `here`, the task runs on a cluster's worker, which keeps a child of its own.

    Raises:
        ChildKilledError: the child died without an answer, or hung and was killed (retried).
        EagleCoreError, StorageError: what the child reported, as it raised it.

    """
    if here is None:
        use_credentials(batch.credentials)
    processes = kept_processes() if here is None else here.processes
    attempt = task_run.run_count or 1
    job = batch.job if attempt == 1 else _rest(batch.job)
    made: list[MadeShard] = []
    what = f"the process of shards {batch.first}-{batch.last}"
    for report in processes.make(job, what=what, silence_seconds=batch.silence_seconds):
        if here is not None:
            here.on_report(report)
        if report.kind == "shard":
            made.append(
                MadeShard(
                    planned_id=report.planned_id,
                    shard_id=report.shard_id,
                    excluded=report.excluded,
                    seconds=report.seconds,
                    attempt=attempt,
                    made_by=report.made_by,
                )
            )
    num_committed = sum(bool(shard.shard_id) for shard in made)
    get_run_logger().info("shards %d-%d: %d committed", batch.first, batch.last, num_committed)
    return tuple(made)


def _rest(job: ShardJob) -> ShardJob:
    """Return the part of a job that an attempt before did not commit."""
    committed = set(Store.open(job.store_root).shard_ids())
    rest = tuple(shard_id for shard_id in job.shard_ids if shard_id not in committed)
    return job.model_copy(update={"shard_ids": rest})
