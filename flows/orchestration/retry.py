"""The one question that retries ask: may trying again help?"""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

import eagle_core.errors
import storage.errors
from flows.errors import ChildKilledError

RETRYABLE = (
    ChildKilledError,
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
