"""Checks of several machines before their first step together: the same run, files and weights.

The first machine is right by definition. Each other compares itself with it, and all raise if one
differs: ranks that differ would train another draft each, or wait for each other forever.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import xxhash

from eagle_core.errors import MismatchError
from eagle_core.training.checkpoint import newest
from eagle_core.training.config import TrainingConfig
from eagle_core.training.decoded_points import weights_digest
from eagle_core.training.distributed import Processes
from eagle_core.training.precision import dtype_name, multiplying_dtype
from flows.bridge.draft_setup import VOCABULARY_NAME, DraftSetup
from flows.bridge.first_weights import SHARED_SECONDS
from flows.bridge.run_lock import owner_of

_LOOK_SECONDS = 1.0


def require_same_files(
    processes: Processes, run_path: Path, files: Mapping[str, Path], *, meeting_id: str
) -> None:
    """Wait until this machine sees the run as the first one does.

    Args:
        processes: all of which call this.
        run_path: folder of the run.
        files: other files that all must have.
        meeting_id: what the lock of the run's folder must name.

    Raises:
        MismatchError: a machine does not see the same; names the machine and what differs.

    """
    look = partial(_seen, run_path, files)
    first = processes.from_first("files", json.dumps(look()) if processes.is_first else None)
    expected = {**json.loads(first), "lock": meeting_id}
    found = _look_until(look, expected)
    _require_alike(
        processes,
        "seen files",
        _differences(expected, found),
        "`home` and the store must be on a file system that all machines share, at the same paths",
    )


def require_same_start(processes: Processes, setup: DraftSetup, training: TrainingConfig) -> None:
    """Raise MismatchError unless all machines are about to do the same first step.

    Args:
        processes: all of which call this.
        setup: the draft with its first weights.
        training: settings of the run, as it has begun.

    """
    device = setup.draft.lm_head.weight.device
    tensors = {**setup.draft.state_dict(), "head of the target": setup.target_lm_head}
    own = {
        "torch": torch.__version__.partition("+")[0],
        "device": device.type,
        "dtype of training": dtype_name(multiplying_dtype(training.dtype, device)),
        "learning rate": str(training.peak_learning_rate),
        "digest of the weights": weights_digest({n: t.detach().cpu() for n, t in tensors.items()}),
    }
    first = processes.from_first("start", json.dumps(own) if processes.is_first else None)
    _require_alike(
        processes,
        "seen start",
        _differences(json.loads(first), own),
        "use machines of one kind with the same versions, or set training.dtype",
    )


@contextmanager
def on_all_or_none(processes: Processes, what: str) -> Iterator[None]:
    """Raise MismatchError after the block if it failed on another machine.

    Without this, the others would wait for that one until their time is over.
    """
    try:
        yield
    except Exception as error:
        processes.tell(what, f"{socket.gethostname()} failed: {error}")
        raise
    failures = dict.fromkeys(text for text in processes.from_all(what, "") if text)
    if failures:
        raise MismatchError(f"training cannot begin on all machines: {'; '.join(failures)}")


def _require_alike(processes: Processes, what: str, differences: str, remedy: str) -> None:
    own = f"on {socket.gethostname()} {differences}" if differences else ""
    found = dict.fromkeys(text for text in processes.from_all(what, own) if text)
    if found:
        raise MismatchError(f"the machines differ: {'; '.join(found)}; {remedy}")


def _seen(run_path: Path, files: Mapping[str, Path]) -> dict[str, str | None]:
    owner = owner_of(run_path)
    checkpoint = newest(run_path)
    return {
        "lock": None if owner is None else owner.token,
        "newest checkpoint": None if checkpoint is None else checkpoint.name,
        VOCABULARY_NAME: _digest(run_path / VOCABULARY_NAME),
        **{name: _size(path) for name, path in files.items()},
    }


def _look_until(
    look: Callable[[], dict[str, str | None]], expected: Mapping[str, str | None]
) -> dict[str, str | None]:
    deadline = time.monotonic() + SHARED_SECONDS
    while (found := look()) != expected and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return found


def _differences(first: Mapping[str, str | None], own: Mapping[str, str | None]) -> str:
    return ", ".join(
        f"{name} is {own.get(name)}, on the first machine {value}"
        for name, value in first.items()
        if own.get(name) != value
    )


def _digest(path: Path) -> str | None:
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError:
        return None


def _size(path: Path) -> str | None:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError:
        return None
