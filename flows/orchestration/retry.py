"""Which errors of tasks are retried."""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

import eagle_core.errors
import storage.errors
from flows.errors import ChildKilledError, ServerUnreachableError

RETRYABLE = (
    ChildKilledError,
    ServerUnreachableError,
    eagle_core.errors.TransientError,
    storage.errors.TransientError,
)


async def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Tell Prefect whether a retry of the task may help."""
    try:
        await state.aresult()
    except RETRYABLE:
        return True
    except BaseException:  # noqa: BLE001 (no other failure is retried)
        return False
    return False
