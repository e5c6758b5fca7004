"""Checkpoints: safetensors and JSON, whole or absent, the newest good one found again.

A checkpoint is a folder `checkpoints/step-XXXXXXXX` with `draft.safetensors`,
`optimizer.safetensors` and `state.json`. It is written under a temporary name, synced and renamed;
`state.json` binds the other two to size and digest, and a checkpoint that does not match is passed
over with a warning. A folder of checkpoints that cannot be listed is an error: it would read as a
run that has not begun.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_core.atomic_files import atomic_folder, file_digest
from eagle_core.bfloat16 import require_finite
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.training.loader import LoaderState

FORMAT_VERSION = 1
_FOLDER = "checkpoints"
_WEIGHTS = "draft.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_FROZEN = "embed_tokens.weight"
"""The target's own tensor: never stored again with every checkpoint."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A point from which training goes on exactly."""

    step: int
    loader: LoaderState
    identity: Mapping[str, Any]
    """What the run was made with; a resumed run must have the same."""
    figures: Mapping[str, Any]
    """The last measured figures, so that a finished run can still report them."""


class _State(BaseModel):
    """What `state.json` holds."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    step: int
    loader: LoaderState
    identity: dict[str, Any]
    figures: dict[str, Any]
    files: dict[str, tuple[int, str]]
    """Size and digest of the two others, by name."""


def save(
    run_path: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    keep_last: int,
) -> Path:
    """Write a checkpoint, then drop all but the newest `keep_last` and the best; return its folder.

    What a kill left of an earlier one goes first: gigabytes, perhaps. One training at a time may
    save into a run.

    Args:
        run_path: folder of the run.
        checkpoint: its record.
        weights: the draft's state dict; what is frozen is left out.
        optimizer: `optimizers.state_tensors`.
        keep_last: checkpoints that are kept.

    Raises:
        DiskError: it cannot be written; those before stay.

    """
    folder = run_path / _FOLDER / f"step-{checkpoint.step:08d}"
    with atomic_folder(folder) as partial:
        trained = {n: tensor.contiguous() for n, tensor in weights.items() if n != _FROZEN}
        save_file(trained, partial / _WEIGHTS)
        save_file(dict(optimizer), partial / _OPTIMIZER)
        document = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(checkpoint),
            "files": {name: _size_and_digest(partial / name) for name in (_WEIGHTS, _OPTIMIZER)},
        }
        (partial / _STATE).write_text(json.dumps(document, indent=2), encoding="utf-8")
    _drop_others(run_path, folder, keep_last=keep_last)
    return folder


def _drop_others(run_path: Path, saved: Path, *, keep_last: int) -> None:
    """Keep what was just saved, the newest and the best; one that cannot be read stays, too."""
    sound, unreadable = [], []
    for found in _folders(run_path):
        try:
            if found == saved or _damage(found) is None:
                sound.append(found)
        except ConfigError as error:
            logger.warning("%s; it stays", error)
            unreadable.append(found)
    kept = {saved, _best(sound), *sound[:keep_last], *unreadable}
    for old in _folders(run_path):
        if old not in kept:
            shutil.rmtree(old)


def best(run_path: Path) -> Path | None:
    """Return the folder of the checkpoint with the longest held-out acceptance, or None.

    Only checkpoints that were written right after a measurement count; of equals, the newest.
    """
    return _best([folder for folder in _folders(run_path) if _damage(folder) is None])


def _best(sound: Sequence[Path]) -> Path | None:
    """Return the best of these undamaged folders, the newest first."""
    measured: list[tuple[float, Path]] = []
    for folder in sound:
        found = read(folder)
        length = found.figures.get("held_out_length")
        if found.figures.get("held_out_step") == found.step and isinstance(length, float):
            measured.append((length, folder))
    return max(measured, default=(0.0, None), key=lambda pair: pair[0])[1]


def newest(run_path: Path) -> Path | None:
    """Return the folder of the newest checkpoint whose files are what its record says, or None."""
    for folder in _folders(run_path):
        damage = _damage(folder)
        if damage is None:
            return folder
        logger.warning(
            "checkpoint %s is damaged (%s); falling back to the one before", folder, damage
        )
    return None


def read(folder: Path) -> Checkpoint:
    """Return the record of a good checkpoint."""
    state = _read_state(folder)
    return Checkpoint(
        step=state.step, loader=state.loader, identity=state.identity, figures=state.figures
    )


def require_identity(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise MismatchError naming every field in which a checkpoint differs from this run."""
    old, new = dict(_flat(found)), dict(_flat(expected))
    differing = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise MismatchError(
            f"{folder} was made with other settings ({'; '.join(differing)}); restore them, or "
            "train under another run name"
        )


def load_draft(draft: DraftModel, run_path: Path) -> int:
    """Load the newest good checkpoint's weights into `draft`; return its step.

    Raises:
        ConfigError: the run has no checkpoint.

    """
    folder = newest(run_path)
    if folder is None:
        raise ConfigError(f"{run_path} has no checkpoint yet; run the train flow first")
    load_weights(draft, folder)
    return read(folder).step


def load_weights(draft: DraftModel, folder: Path) -> None:
    """Load a checkpoint's weights; the frozen embedding stays the draft's.

    Raises:
        CorruptError: a weight is not finite.

    """
    weights = load_file(folder / _WEIGHTS)
    cure = "delete this checkpoint: the one before is used then"
    require_finite(weights, where=str(folder), cure=cure)
    weights[_FROZEN] = draft.embed_tokens.weight.detach().cpu()
    draft.load_state_dict(weights)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's optimizer state by tensor name."""
    state: dict[str, Tensor] = load_file(folder / _OPTIMIZER)
    return state


def _folders(run_path: Path) -> Sequence[Path]:
    """Return checkpoint folders, newest first."""
    return sorted(_listed(run_path / _FOLDER, "step-"), reverse=True)


def _listed(folder: Path, prefix: str) -> Sequence[Path]:
    """Return what lies in a folder under such names; nothing where there is no folder."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith(prefix)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot list the checkpoints of the run: {error}") from error


def _read_state(folder: Path) -> _State:
    """Return what `state.json` holds; OSError or ValueError if that cannot be told."""
    return _State.model_validate(json.loads((folder / _STATE).read_text(encoding="utf-8")))


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None.

    Raises:
        ConfigError: it cannot be read, which tells nothing about it.

    """
    try:
        return _found_damage(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return str(error)
    except OSError as error:
        raise ConfigError(f"cannot read checkpoint {folder.name}: {error}") from error


def _found_damage(folder: Path) -> str | None:
    try:
        state = _read_state(folder)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{_STATE}: {'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        return f"{_STATE}: {error}"
    if state.format_version != FORMAT_VERSION:
        return f"format version {state.format_version}, expected {FORMAT_VERSION}"
    if folder.name != f"step-{state.step:08d}":
        return f"{_STATE} is of step {state.step}"
    for name in (_WEIGHTS, _OPTIMIZER):
        if _size_and_digest(folder / name) != state.files.get(name):
            return f"{name} is not what {_STATE} says"
    return None


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _size_and_digest(path: Path) -> tuple[int, str]:
    return path.stat().st_size, file_digest(path)
