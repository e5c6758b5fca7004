"""Errors of the orchestration itself, and the one question retries ask."""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

import eagle_core.errors
import storage.errors


class FlowError(Exception):
    """Base of every error raised on purpose by `flows`."""


class ShardProcessKilledError(FlowError):
    """A shard process died without an answer: out of memory, a device fault, a reboot."""


class MissingShardsError(FlowError):
    """Some shards have no commit record after every batch has ended."""


class TrainingStoppedError(FlowError):
    """Training was asked to stop, wrote a checkpoint and did; what comes after it must not run."""


class DoesNotFitError(FlowError):
    """The states would not fit on the disk or into the budget: a person decides what to change."""


RETRYABLE = (
    ShardProcessKilledError,
    eagle_core.errors.TransientError,
    storage.errors.TransientError,
)


async def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Tell Prefect whether trying the task again may help."""
    try:
        await state.aresult()
    except RETRYABLE:
        return True
    except BaseException:  # noqa: BLE001 (the answer for every other failure is no, whatever it is)
        return False
    return False
