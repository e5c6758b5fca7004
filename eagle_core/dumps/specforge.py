"""SpecForge: one `.ckpt` or `.ckpt.gz` per sample, padding of its batch included.

Keys: `input_ids` and `loss_mask` [T], `hidden_state` [1, T, H] after the final norm, and
`aux_hidden_state` [1, T, 3H]. The mask is that of the tokens themselves, not shifted.
"""

from functools import partial
from pathlib import Path

from eagle_core.dumps.dump import Dump, DumpedStates, DumpRow
from eagle_core.dumps.folder import dump_files, location_of
from eagle_core.dumps.torch_file import optional_tensor, read_torch_file, tensor

_SUFFIXES = (".ckpt", ".ckpt.gz")
_KEYS = ("input_ids", "loss_mask", "hidden_state", "aux_hidden_state")


def open_specforge(path: Path) -> Dump:
    """Return the rows of a folder, or of one file."""
    files = dump_files(
        path, is_wanted=lambda name: name.endswith(_SUFFIXES), expected=" or ".join(_SUFFIXES)
    )
    rows = [
        DumpRow(location=location_of(file), file=file, load=partial(_read, file)) for file in files
    ]
    return Dump(format="specforge", rows=rows, num_rows=len(rows), has_masks=True)


def _read(file: Path) -> DumpedStates:
    where = location_of(file)
    found = read_torch_file(file, where)
    return DumpedStates(
        input_ids=tensor(found, "input_ids", where, known=_KEYS),
        loss_mask=tensor(found, "loss_mask", where, known=_KEYS),
        attention_mask=optional_tensor(found, "attention_mask", where, known=_KEYS),
        aux=tensor(found, "aux_hidden_state", where, known=_KEYS),
        last=tensor(found, "hidden_state", where, known=_KEYS),
        last_is_normed=True,
        padding_id=0,  # what its batches are filled with
    )
