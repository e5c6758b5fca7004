"""The exported folders of a run, compared with what the run would write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eagle_core.diagnosis.draft_interface import Exports
from eagle_core.diagnosis.export_config import Difference, differences
from eagle_core.draft.export import CONFIG_NAME, ServedTarget, serving_config, speculators_config
from eagle_core.draft.export_config import ExportConfig
from eagle_core.draft.layout import from_any_layout
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.safetensors_files import load_tensor, tensor_files

_COMPARED = "fc.weight"
"""A tensor that every step of training changes, in all layouts."""
_SPECULATORS = "transformer_layer_config"
_ROUNDING = 2**-7
"""Relative error of a weight that was rounded to bfloat16, and a little more."""


def exported_folders(folder: Path) -> list[Path]:
    """Return `folder` if it is an export, else the exports in it."""
    found = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    return [one for one in found if (one / CONFIG_NAME).is_file()]


def compare_exports(
    folders: Sequence[Path], draft: DraftModel, layers: tuple[int, int, int]
) -> Exports | str:
    """Compare exports with a draft that reads `layers`; returns why that is not possible.

    Raises:
        CorruptError: a configuration is no JSON.

    """
    if not folders:
        return "there is no export"
    differing: list[Difference] = []
    stale = []
    served = ServedTarget(
        name_or_path="",
        architectures=(),
        aux_layers=layers,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    for folder in folders:
        found = _read(folder / CONFIG_NAME)
        write = speculators_config if _SPECULATORS in found else serving_config
        expected = write(draft.config, served, ExportConfig())
        differing += differences(found, expected, file=f"{folder.name}/{CONFIG_NAME}")
        if not _has_weights(folder, draft):
            stale.append(folder.name)
    return Exports(
        names=tuple(folder.name for folder in folders),
        differences=tuple(differing),
        stale=tuple(stale),
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON: {error}; export the run again") from error
    if not isinstance(found, Mapping):
        raise CorruptError(f"{path} holds no JSON object; export the run again")
    return found


def _has_weights(folder: Path, draft: DraftModel) -> bool:
    files = tensor_files(folder)
    name = next((one for one in files if from_any_layout(one) == _COMPARED), None)
    if name is None:
        raise ConfigError(f"{folder} has no {_COMPARED}: it is no export of an EAGLE-3 draft")
    own = draft.published_tensors()[_COMPARED].float().cpu()
    found = load_tensor(files, name).float()
    return found.shape == own.shape and torch.allclose(found, own, rtol=_ROUNDING, atol=0)
