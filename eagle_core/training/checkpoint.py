"""Checkpoints in safetensors and JSON: complete or absent; loading takes the newest sound one.

A checkpoint is a folder `checkpoints/step-XXXXXXXX` with `draft.safetensors`,
`optimizer.safetensors` and `state.json`. It is written under a temporary name, synced and renamed.
`state.json` records size and digest of the other two files; a checkpoint that does not match is
skipped with a warning. A process reads each file once to check it, and again if it was written
since. A checkpoints folder that cannot be listed is an error: the run would look
as if it had not started.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_core.atomic_files import atomic_folder, file_digest, write_text
from eagle_core.bfloat16 import require_finite
from eagle_core.draft.layout import EMBEDDING
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.target.folder_state import FileIdentity, file_identity
from eagle_core.training.config import WHOLE_SAMPLES, BestBy
from eagle_core.training.decoded_points import decoded_lengths
from eagle_core.training.loader import LoaderState
from eagle_core.training.schedule import Decay

FORMAT_VERSION = 1
_FOLDER = "checkpoints"
WEIGHTS_NAME = "draft.safetensors"
_OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NO_LONGER_RECORDED = ("start_from", "fc_norm", "norm_output")
"""Settings of training in checkpoints of older versions; the draft's sizes have the norms."""
_BEFORE = {"training.window_tokens": WHOLE_SAMPLES}
"""What settings were that checkpoints of older versions do not name."""
_TARGETS = (EMBEDDING,)
"""The tensors that are the target's own, in a plain draft: not stored in checkpoints."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A point from which training resumes exactly."""

    step: int
    loader: LoaderState
    identity: Mapping[str, Any]
    """Data and settings of the run; a resumed run must have the same."""
    figures: Mapping[str, Any]
    """The last metrics, so that a finished run can still report them."""
    decay: Decay | None = None
    """Of the learning rate; None in checkpoints of earlier versions."""


class _State(BaseModel):
    """Content of `state.json`."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    step: int
    loader: LoaderState
    identity: dict[str, Any]
    figures: dict[str, Any]
    files: dict[str, tuple[int, str]]
    """Size and digest of the other two files, by name."""
    decay: Decay | None = None


def save(
    run_path: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    keep_last: int,
    best_by: BestBy = "joint_prefix",
    undecided: int | None = None,
    omitted: Collection[str] = _TARGETS,
) -> Path:
    """Write a checkpoint, delete all but the newest `keep_last` and the best; return its folder.

    Leftovers of a killed save are deleted first: they may take gigabytes. Only one training at a
    time may save into a run.

    Args:
        run_path: folder of the run.
        checkpoint: its record.
        weights: the draft's state dict.
        optimizer: `optimizers.state_tensors`.
        keep_last: number of newest checkpoints to keep.
        best_by: what makes a checkpoint the best.
        undecided: step of a checkpoint to keep, too: it may turn out to be the best.
        omitted: names of the weights that are the target's own (`DraftModel.target_tensors`).

    Raises:
        DiskError: it cannot be written; earlier checkpoints remain.

    """
    folder = folder_of(run_path, checkpoint.step)
    with atomic_folder(folder) as partial:
        trained = {n: tensor.contiguous() for n, tensor in weights.items() if n not in omitted}
        save_file(trained, partial / WEIGHTS_NAME)
        save_file(dict(optimizer), partial / _OPTIMIZER)
        document = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(checkpoint),
            "files": {
                name: _size_and_digest(partial / name) for name in (WEIGHTS_NAME, _OPTIMIZER)
            },
        }
        (partial / STATE).write_text(json.dumps(document, indent=2), encoding="utf-8")
    spared = {folder} if undecided is None else {folder, folder_of(run_path, undecided)}
    _drop_others(run_path, folder, spared, keep_last=keep_last, best_by=best_by)
    return folder


def _drop_others(
    run_path: Path, saved: Path, spared: Collection[Path], *, keep_last: int, best_by: BestBy
) -> None:
    """Keep the checkpoint just saved, the newest, the best, and any that cannot be read."""
    sound, unreadable = [], []
    for found in _folders(run_path):
        try:
            if found == saved or _damage(found) is None:
                sound.append(found)
        except ConfigError as error:
            logger.warning("%s; keeping it", error)
            unreadable.append(found)
    found_best = _best(run_path, sound, best_by)
    kept = {*spared, *sound[:keep_last], *unreadable}
    if found_best is not None:
        kept.add(found_best.folder)
    for old in _folders(run_path):
        if old not in kept:
            shutil.rmtree(old)


@dataclass(frozen=True, kw_only=True, slots=True)
class BestFolder:
    """A checkpoint with the largest acceptance length."""

    folder: Path
    step: int
    length: float


def best(run_path: Path, best_by: BestBy = "joint_prefix") -> Path | None:
    """Return the folder of the best checkpoint, or None; see `find_best`."""
    found = find_best(run_path, best_by)
    return None if found is None else found.folder


def find_best(run_path: Path, best_by: BestBy) -> BestFolder | None:
    """Return the checkpoint with the longest acceptance, on held-out states or decoded, or None.

    Only checkpoints written right after a measurement count; among equals, the newest wins.
    """
    return _best(run_path, sound_folders(run_path), best_by)


def sound_folders(run_path: Path) -> Sequence[Path]:
    """Return the folders of undamaged checkpoints, newest first."""
    return [folder for folder in _folders(run_path) if _damage(folder) is None]


def _best(run_path: Path, sound: Sequence[Path], best_by: BestBy) -> BestFolder | None:
    """Return the best of these undamaged folders, which are sorted newest first."""
    decoded = decoded_lengths(run_path) if best_by == "decoding" else {}
    measured: list[BestFolder] = []
    for folder in sound:
        found = read(folder)
        length = decoded.get(found.step) if best_by == "decoding" else _held_out_length(found)
        if length is not None:
            measured.append(BestFolder(folder=folder, step=found.step, length=length))
    return max(measured, default=None, key=lambda one: one.length)


def _held_out_length(found: Checkpoint) -> float | None:
    """Return the acceptance length on held-out states, if it was measured at that step."""
    length = found.figures.get("held_out_length")
    is_own = found.figures.get("held_out_step") == found.step
    return length if is_own and isinstance(length, float) else None


def newest(run_path: Path) -> Path | None:
    """Return the folder of the newest checkpoint whose files match its record, or None."""
    for folder in _folders(run_path):
        damage = _damage(folder)
        if damage is None:
            return folder
        logger.warning(
            "checkpoint %s is damaged (%s); falling back to the previous one", folder, damage
        )
    return None


def read(folder: Path) -> Checkpoint:
    """Return the record of a sound checkpoint."""
    state = _read_state(folder)
    return Checkpoint(
        step=state.step,
        loader=state.loader,
        identity=state.identity,
        figures=state.figures,
        decay=state.decay,
    )


def add_decay(folder: Path, decay: Decay) -> None:
    """Record the decay of a checkpoint that an earlier version wrote.

    Otherwise it would be lost: the run's other files soon describe the attempt that resumes.
    """
    document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    document["decay"] = dataclasses.asdict(decay)
    write_text(folder / STATE, json.dumps(document, indent=2))


def require_identity(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise MismatchError naming every field in which a checkpoint differs from this run."""
    old, new = dict(_flat(found)), dict(_flat(expected))
    for name in _NO_LONGER_RECORDED:
        old.pop(f"training.{name}", None)
    old = {name: value for name, value in _BEFORE.items() if name in new} | old
    differing = [
        f"{name}: saved {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise MismatchError(
            f"{folder} was written with other settings ({'; '.join(differing)}); restore them, or "
            "train under another run name"
        )


def load_draft(draft: DraftModel, run_path: Path) -> int:
    """Load the newest sound checkpoint's weights into `draft`; return its step.

    Raises:
        ConfigError: the run has no checkpoint.

    """
    folder = newest(run_path)
    if folder is None:
        raise ConfigError(f"{run_path} has no checkpoint yet; run the train flow first")
    load_weights(draft, folder)
    return read(folder).step


def load_weights(draft: DraftModel, folder: Path) -> None:
    """Load a checkpoint's weights; keep those that are the target's own.

    Raises:
        CorruptError: a weight is not finite.

    """
    weights = load_file(folder / WEIGHTS_NAME)
    cure = "delete this checkpoint to use the previous one"
    require_finite(weights, where=str(folder), cure=cure)
    draft.load_tensors({**weights, **draft.target_tensors()})


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's optimizer state by tensor name."""
    state: dict[str, Tensor] = load_file(folder / _OPTIMIZER)
    return state


def folder_of(run_path: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, whether it is there or not."""
    return run_path / _FOLDER / f"step-{step:08d}"


def _folders(run_path: Path) -> Sequence[Path]:
    """Return checkpoint folders, newest first."""
    return sorted(_listed(run_path / _FOLDER, "step-"), reverse=True)


def _listed(folder: Path, prefix: str) -> Sequence[Path]:
    """Return the paths in a folder whose names start with `prefix`; none without the folder."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith(prefix)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot list the checkpoints of the run: {error}") from error


def _read_state(folder: Path) -> _State:
    """Return the content of `state.json`; OSError or ValueError if it cannot be read."""
    return _State.model_validate(json.loads((folder / STATE).read_text(encoding="utf-8")))


def _damage(folder: Path) -> str | None:
    """Return a description of a checkpoint's damage, or None.

    Raises:
        ConfigError: it cannot be read, so its state is unknown.

    """
    try:
        return _find_damage(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return str(error)
    except OSError as error:
        raise ConfigError(f"cannot read checkpoint {folder.name}: {error}") from error


def _find_damage(folder: Path) -> str | None:
    try:
        state = _read_state(folder)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{STATE}: {'.'.join(map(str, first['loc'])) or 'whole file'}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        return f"{STATE}: {error}"
    if state.format_version != FORMAT_VERSION:
        return f"format version {state.format_version}, expected {FORMAT_VERSION}"
    if folder.name != f"step-{state.step:08d}":
        return f"{STATE} records step {state.step}"
    for name in (WEIGHTS_NAME, _OPTIMIZER):
        if _checked(folder / name, file_identity(folder / name)) != state.files.get(name):
            return f"{name} does not match {STATE}"
    return None


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _size_and_digest(path: Path) -> tuple[int, str]:
    return path.stat().st_size, file_digest(path)


@lru_cache(maxsize=64)
def _checked(path: Path, _identity: FileIdentity | None) -> tuple[int, str]:
    """Return size and digest; read once in a process, as gigabytes take seconds."""
    return _size_and_digest(path)
