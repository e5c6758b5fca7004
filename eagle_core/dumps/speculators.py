"""speculators: one `hs_{i}.safetensors` per row of a data set, one row per assistant turn.

Tensors: `hidden_states` [T, A + 1, H], the last of which is the state before the final norm, and
`token_ids` [T]; in float8, with one scale per token in `hidden_states_scales`. The loss masks are
in the data set that the rows are of, a folder of `datasets` around or beside the states; several
folders of states have one each. A row is read only if no longer one that begins with its tokens
was; its mask is merged into that one's. A row whose tokens are not those of its data set is read in
any case, which names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.dumps.dump import MALFORMED, Dump, DumpedStates, DumpRow
from eagle_core.dumps.folder import dump_files, location_of
from eagle_core.dumps.prefixes import Prefixes, find_prefixes, merged
from eagle_core.dumps.safetensors_row import read_safetensors
from eagle_core.dumps.saved_dataset import SavedDataset, find_dataset

_PREFIX, _SUFFIX = "hs_", ".safetensors"
_STATES, _IDS, _SCALES = "hidden_states", "token_ids", "hidden_states_scales"
_NUM_DIMS = 3


def open_speculators(path: Path, *, with_masks: bool = True) -> Dump:
    """Return the rows of a folder of states, or of the data set that it is in.

    Reads all token ids from the files of the states. Without `with_masks`, no data set is read.

    Raises:
        ConfigError: there are no such files.
        CorruptError: the data set is damaged.

    """
    files = dump_files(path, is_wanted=_is_states, expected=f"{_PREFIX}*{_SUFFIX}")
    folders = dict.fromkeys(file.parent for file in files)
    found = {folder: find_dataset(folder) if with_masks else None for folder in folders}
    datasets = {folder: dataset for folder, dataset in found.items() if dataset is not None}
    rows = _Rows(files=files, datasets=datasets)
    prefixes = find_prefixes(len(files), rows.ids)
    names = [location_of(file) for file in files]
    listed = [
        DumpRow(
            location=names[row],
            file=files[row],
            load=partial(rows.read, row, prefixes),
            covered_by=tuple(names[other] for other in prefixes.covers.get(row, ())),
        )
        for row in prefixes.order
    ]
    of = ", ".join(dict.fromkeys(str(dataset.folder) for dataset in datasets.values()))
    origin = f"loss masks of {of}" if datasets else "no data set with loss masks found"
    return Dump(
        format="speculators",
        rows=listed,
        num_rows=len(listed),
        has_masks=bool(datasets),
        origin=origin,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    files: Sequence[Path]
    datasets: Mapping[Path, SavedDataset]
    """By folder of states."""

    def ids(self, row: int) -> NDArray[np.int64] | None:
        """Return the ids of a row; None if it cannot be read, or its data set has others."""
        file = self.files[row]
        try:
            ids = read_safetensors(file, "", _ids, required=(_IDS,))
            self._own_mask(row, ids)
        except (RejectedRecord, *MALFORMED):
            return None
        return ids

    def read(self, row: int, prefixes: Prefixes) -> DumpedStates:
        """Return a row, with the merged masks of all that it contains."""
        file = self.files[row]
        where = location_of(file)
        states, ids = read_safetensors(file, where, _tensors, required=(_STATES, _IDS))
        if states.ndim != _NUM_DIMS or states.shape[1] < 2:
            detail = f"{_STATES} is {list(states.shape)}, expected [tokens, layers, hidden size]"
            raise RejectedRecord(Reason.WRONG_SHAPE, where, detail)
        return DumpedStates(
            input_ids=ids,
            loss_mask=self._mask(row, ids, prefixes),
            aux=states[:, :-1],
            last=states[:, -1],
            last_is_normed=False,
        )

    def _mask(self, row: int, ids: Tensor, prefixes: Prefixes) -> Tensor | None:
        own = self._own_mask(row, ids.reshape(-1).numpy())
        if own is None:
            return None
        parts = [
            mask
            for part in prefixes.parts_of(row)
            if (part_ids := self.ids(part)) is not None
            and (mask := self._own_mask(part, part_ids)) is not None
        ]
        return torch.from_numpy(merged([own, *parts]))

    def _own_mask(self, row: int, ids: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Return the mask of a row with these ids; None if there is no data set beside it."""
        file = self.files[row]
        dataset = self.datasets.get(file.parent)
        if dataset is None:
            return None
        number = _number(file)
        if number >= len(dataset):
            detail = f"the data set in {dataset.folder} has only {len(dataset)} rows"
            raise RejectedRecord(Reason.NO_MASK, "", detail)
        if not np.array_equal(ids, dataset.input_ids(number)):
            detail = f"{_IDS} differ from row {number} of the data set in {dataset.folder}"
            raise RejectedRecord(Reason.BAD_TOKENS, "", detail)
        mask = dataset.loss_mask(number)
        if len(mask) != len(ids):
            detail = f"its loss mask has {len(mask)} entries, its ids {len(ids)}"
            raise RejectedRecord(Reason.BAD_TOKENS, "", detail)
        return mask


def _is_states(name: str) -> bool:
    is_named = name.startswith(_PREFIX) and name.endswith(_SUFFIX)
    return is_named and name[len(_PREFIX) : -len(_SUFFIX)].isdecimal()


def _number(file: Path) -> int:
    return int(file.name[len(_PREFIX) : -len(_SUFFIX)])


def _tensors(file: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 (untyped library)
    """Return states and ids; states in float8 are multiplied by their scales."""
    states, ids = file.get_tensor(_STATES), file.get_tensor(_IDS)
    if _SCALES in file.keys():  # noqa: SIM118 (no mapping)
        scales = file.get_tensor(_SCALES).float()
        states = states.float() * scales.reshape(-1, *[1] * (states.ndim - 1))
    return states, ids


def _ids(file: Any) -> NDArray[np.int64]:  # noqa: ANN401 (untyped library)
    ids: Tensor = file.get_tensor(_IDS)
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{_IDS} are {ids.dtype}, expected integers")
    numbers: NDArray[np.int64] = ids.reshape(-1).numpy().astype(np.int64)
    return numbers
