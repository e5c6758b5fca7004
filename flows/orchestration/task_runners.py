"""Starts the task runners of shard batches: threads with one child each, or a cluster."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from eagle_core.target.config import TargetConfig
from flows.config.runner import RunnerConfig
from flows.errors import FlowError
from flows.workers.pool import WorkerPool, local_slots
from flows.workers.shard_batch import ShardBatch, ShardReport

Result = TypeVar("Result")
Submit = Callable[[ShardBatch], PrefectFuture[Result]]


@contextmanager
def running(
    runner: RunnerConfig,
    target: TargetConfig,
    task: Task[[ShardBatch, WorkerPool | None], Result],
    *,
    on_report: Callable[[ShardReport], None],
) -> Iterator[Submit[Result]]:
    """Yield a function that submits a batch to `task`; all started processes end with the block.

    `on_report` is called for each sample as it is computed, unless a cluster computes it.

    Raises:
        FlowError: the package of the cluster is not installed.

    """
    if runner.kind == "processes":
        pool = WorkerPool(local_slots(target, runner.num_workers), on_report=on_report)
        with ThreadPoolTaskRunner(max_workers=runner.num_workers) as threads:  # type: ignore[var-annotated]
            try:
                yield lambda batch: threads.submit(task, {"batch": batch, "pool": pool})
            finally:
                pool.close()
    else:
        with _cluster(runner, num_gpus=target.tensor_parallel) as cluster:
            yield lambda batch: cluster.submit(task, {"batch": batch, "pool": None})


@contextmanager
def _cluster(runner: RunnerConfig, *, num_gpus: int) -> Iterator[TaskRunner[Any]]:
    package = _package(f"prefect_{runner.kind}", runner.kind)
    given: dict[str, Any] | None = {"address": runner.address} if runner.address else None
    if runner.kind == "dask":
        size = {"n_workers": runner.num_workers, "threads_per_worker": 1, "dashboard_address": None}
        with package.DaskTaskRunner(**(given or {"cluster_kwargs": size})) as dask:
            yield dask
        return
    # Without an address Ray joins the one that runs here, or waits for one that has ended.
    own = {"address": "local", "num_cpus": runner.num_workers, "include_dashboard": False}
    with package.RayTaskRunner(**(given or {"init_kwargs": own})) as ray:
        has_gpus = _package("ray", "ray").cluster_resources().get("GPU", 0) > 0
        # Ray hides every GPU from a task that requests none.
        with _package("prefect_ray.context", "ray").remote_options(num_gpus=has_gpus * num_gpus):
            yield ray


def _package(name: str, kind: str) -> Any:  # noqa: ANN401 (it is optional)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FlowError(
            f"runner.kind is {kind!r}, but {name} cannot be imported here ({error}); run: "
            f"pip install -e '.[{kind}]' in the repository, or set runner.kind to processes"
        ) from error
