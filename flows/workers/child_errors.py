"""Errors for the end of a child process: a reported error, a kill, or a defect."""

import importlib
from collections.abc import Sequence
from typing import IO

from flows.errors import ChildFailedError, ChildKilledError, FlowError
from flows.workers.channel import Failure

STDERR_TAIL_CHARS = 2000
_RANKS_TAIL_CHARS = 5000
_RANKS_SUMMARY = " FAILED\n---"
"""Where torchrun's summary of the ranks begins, after its own traceback."""


def as_raised(failures: Sequence[Failure], what: str) -> Exception:
    """Return the first reported error, with the messages of the same kind by other processes."""
    kind = failures[0].failure
    messages = dict.fromkeys(failure.message for failure in failures if failure.failure == kind)
    message = "; another process: ".join(messages)
    if failures[0].traceback:
        return ChildFailedError(f"{what} failed: {kind}: {message}\n{failures[0].traceback}")
    module, _, name = kind.rpartition(".")
    if module not in {"eagle_core.errors", "storage.errors"}:
        return FlowError(f"{kind}: {message}")
    error: Exception = getattr(importlib.import_module(module), name)(message)
    return error


def last_output(stderr: IO[str]) -> str:
    """Return the end of what a child wrote, or torchrun's summary of its ranks."""
    try:
        stderr.seek(0)
        text = stderr.read()
    except ValueError:  # closed by another thread: the child was ended on purpose
        return ""
    _, is_of_ranks, summary = text.rpartition(_RANKS_SUMMARY)
    if is_of_ranks:
        return summary.strip("-=\n")[-_RANKS_TAIL_CHARS:].strip()
    return text[-STDERR_TAIL_CHARS:].strip()


def end_error(what: str, status: int, tail: str) -> FlowError:
    """Return the error for a child that ended without a result: a kill, or a defect."""
    kind = ChildKilledError if status < 0 else ChildFailedError
    return kind(how_it_ended(what, status, tail))


def how_it_ended(what: str, status: int, tail: str) -> str:
    """Return the message for an exit status, with the last output."""
    cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = " (out of memory? lower target.batch_tokens)" if status == -9 else ""
    return f"{what} {cause}{hint}{quoted(tail)}"


def quoted(tail: str) -> str:
    """Return the last output as the end of a message."""
    return f"; its last output: {tail}" if tail else ""
