"""Model-Optimizer: one `.pt` per conversation.

Keys: `input_ids` [T], `hidden_states` [T, H], `aux_hidden_states` [T, 3H], in newer ones
`loss_mask` [T] (if dumped for answers only) and `hidden_states_prenorm` (whether `hidden_states`
are those before the final norm; absent in dumps of transformers, which are after it).
"""

from functools import partial
from pathlib import Path

from eagle_core.dumps.dump import Dump, DumpedStates, DumpRow
from eagle_core.dumps.folder import dump_files, location_of
from eagle_core.dumps.torch_file import optional_tensor, read_torch_file, tensor

_KEYS = ("input_ids", "hidden_states", "aux_hidden_states")


def open_model_optimizer(path: Path) -> Dump:
    """Return the rows of a folder, or of one file."""
    files = dump_files(path, is_wanted=lambda name: name.endswith(".pt"), expected=".pt")
    rows = [
        DumpRow(location=location_of(file), file=file, load=partial(_read, file)) for file in files
    ]
    return Dump(format="model-optimizer", rows=rows, num_rows=len(rows), has_masks=True)


def _read(file: Path) -> DumpedStates:
    where = location_of(file)
    found = read_torch_file(file, where)
    return DumpedStates(
        input_ids=tensor(found, "input_ids", where, known=_KEYS),
        loss_mask=optional_tensor(found, "loss_mask", where, known=_KEYS),
        aux=tensor(found, "aux_hidden_states", where, known=_KEYS),
        last=tensor(found, "hidden_states", where, known=_KEYS),
        last_is_normed=not bool(found.get("hidden_states_prenorm", False)),
    )
