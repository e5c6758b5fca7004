"""The columns `input_ids` and `loss_mask` of a data set that `datasets` saved to disk.

A folder with `state.json`, which lists files of Arrow streams. They are memory-mapped.
"""

import json
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.errors import CorruptError

_STATE = "state.json"
_COLUMNS = ("input_ids", "loss_mask")


class SavedDataset:
    """Random access to ids and masks by row."""

    def __init__(self, folder: Path, table: pa.Table) -> None:
        """Use `SavedDataset.open` instead."""
        self.folder = folder
        self._ids, self._masks = (table[name] for name in _COLUMNS)

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """Return the data set in a folder; None if there is none with ids and masks.

        Raises:
            CorruptError: its files are missing or damaged.

        """
        if not (folder / _STATE).is_file():
            return None
        try:
            state = json.loads((folder / _STATE).read_bytes())
            parts = [folder / one["filename"] for one in state["_data_files"]]
            tables = [pa.ipc.open_stream(pa.memory_map(str(part))).read_all() for part in parts]
            table = pa.concat_tables(tables)
            return cls(folder, table) if set(_COLUMNS) <= set(table.column_names) else None
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            raise CorruptError(
                f"the data set in {folder} cannot be read ({error}); restore it, or move the "
                "folder of states away from it and give --mask template"
            ) from error

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ids)

    def input_ids(self, row: int) -> NDArray[np.int64]:
        """Return the token ids [T] of a row."""
        return _numbers(self._ids, row)

    def loss_mask(self, row: int) -> NDArray[np.bool_]:
        """Return the loss mask [T] of a row."""
        values = self._masks[row].values.to_numpy(zero_copy_only=False)
        if not np.isin(values, (0, 1)).all():
            detail = f"the loss mask of row {row} in {self.folder} has other values than 0 and 1"
            raise RejectedRecord(Reason.BAD_TOKENS, "", detail)
        mask: NDArray[np.bool_] = values.astype(np.bool_)
        return mask


def find_dataset(folder: Path) -> SavedDataset | None:
    """Return the data set whose states are in `folder`: in it, or in the folder around it."""
    return SavedDataset.open(folder) or SavedDataset.open(folder.resolve().parent)


def _numbers(column: pa.ChunkedArray, row: int) -> NDArray[np.int64]:
    values: NDArray[np.int64] = column[row].values.to_numpy(zero_copy_only=False)
    return values.astype(np.int64)
