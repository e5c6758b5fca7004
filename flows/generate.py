"""One task run = one batch of shards, made by a child process that loads the target once.

A kernel kill or a device fault in the child costs its batch, never the flow run.
"""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.errors import FlowError, ShardProcessKilledError, is_transient
from flows.shard_worker import ANSWERED_FAILURE, ShardJob, ShardReport

_STDERR_TAIL_CHARS = 2000


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
        ShardProcessKilledError: the child died without an answer (retried).
        EagleCoreError, StorageError: what the child reported, as it raised it.

    """
    committed = 0
    failure: ShardReport | None = None
    with tempfile.TemporaryFile("w+") as stderr, _child(batch.job, stderr) as child:
        for line in child.stdout or ():
            report = ShardReport.model_validate_json(line)
            committed += report.kind == "shard"
            failure = report if report.kind == "failure" else failure
            on_report(report)
        status = child.wait()
        if failure is not None and status == ANSWERED_FAILURE:
            raise _as_raised(failure)
        if status != 0:
            raise ShardProcessKilledError(_epitaph(batch, status, _tail(stderr)))
    return committed


def _child(job: ShardJob, stderr: IO[str]) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.shard_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert child.stdin is not None  # noqa: S101 (PIPE was asked for)
    child.stdin.write(job.model_dump_json())
    child.stdin.close()
    return child


def _as_raised(failure: ShardReport) -> Exception:
    module, _, name = failure.error.rpartition(".")
    if module not in {"eagle_core.errors", "storage.errors"}:
        return FlowError(f"{failure.error}: {failure.message}")
    error: Exception = getattr(importlib.import_module(module), name)(failure.message)
    return error


def _tail(stderr: IO[str]) -> str:
    stderr.seek(0)
    return stderr.read()[-_STDERR_TAIL_CHARS:].strip()


def _epitaph(batch: ShardBatch, status: int, tail: str) -> str:
    cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = " (out of memory? lower target.batch_tokens)" if status == -9 else ""
    last_words = f"; its last words: {tail}" if tail else ""
    return f"the process of shards {batch.first}-{batch.last} {cause}{hint}{last_words}"
