"""NeMo Automodel: a cache of `manifest.json` and `shard-*.safetensors`, each of several samples.

Tensors: `input_ids`, `attention_mask`, `loss_mask` [N, S], and `aux_hidden_states` [N, S, 3H];
padded to one length. Ids and mask are those of the next token: the first token is not stored. Nor
is the last hidden state, only the target's distribution over the draft vocabulary that the cache
was made for; the target's last layers recompute the state from the last aux layer's.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eagle_core.data.ledger import RejectedRecord
from eagle_core.dumps.dump import Dump, DumpedStates, DumpRow
from eagle_core.dumps.folder import dump_files, location_of
from eagle_core.dumps.safetensors_row import read_safetensors
from eagle_core.errors import ConfigError, CorruptError

_MANIFEST = "manifest.json"
_VERSION = 2
_NUM_DIMS = 2
_KEYS = ("input_ids", "attention_mask", "loss_mask", "aux_hidden_states")


def open_nemo(path: Path) -> Dump:
    """Return the rows of a cache.

    Raises:
        ConfigError: there is no manifest or no shard, or it is of another version.
        CorruptError: the manifest is damaged.

    """
    files = dump_files(path, is_wanted=_is_shard, expected="shard-*.safetensors")
    manifest = (path.parent if path.is_file() else path) / _MANIFEST
    try:
        found = json.loads(manifest.read_bytes())
        version, layers = found["format_version"], tuple(map(int, found["aux_layer_ids"]))
        num_rows, target = int(found["num_samples"]), str(found["target_model"])
    except FileNotFoundError as error:
        raise ConfigError(f"{manifest} does not exist; name the folder of the cache") from error
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise CorruptError(
            f"{manifest} is damaged ({type(error).__name__}: {error}); restore it: it says which "
            "layers the states are of"
        ) from error
    if version != _VERSION:
        raise ConfigError(
            f"{manifest} has format_version {version}; this release reads {_VERSION}: write the "
            "cache again with a newer NeMo Automodel"
        )
    return Dump(
        format="nemo",
        rows=_Rows(files=tuple(files), order=tuple(np.argsort(layers).tolist())),
        num_rows=num_rows,
        has_masks=True,
        has_last=False,
        aux_layers=tuple(sorted(layers)),
        origin=f"states of {target}",
    )


def _is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith(".safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Lists the rows of the shards; a shard that cannot be opened is one row."""

    files: tuple[Path, ...]
    order: tuple[int, ...]
    """Where the aux layers, low to high, are among those of a file."""

    def __iter__(self) -> Iterator[DumpRow]:
        for file in self.files:
            where = location_of(file)
            try:
                count = read_safetensors(file, where, _num_rows, required=_KEYS)
            except RejectedRecord:
                load = partial(_read, file, where, 0, self.order)
                yield DumpRow(location=where, file=file, load=load)
                continue
            for row in range(count):
                name = f"{where}#{row}"
                load = partial(_read, file, name, row, self.order)
                yield DumpRow(location=name, file=file, load=load)


def _num_rows(file: Any) -> int:  # noqa: ANN401 (untyped library)
    return int(file.get_slice(_KEYS[0]).get_shape()[0])


def _read(file: Path, where: str, row: int, order: Sequence[int]) -> DumpedStates:
    def slices(opened: Any) -> DumpedStates:  # noqa: ANN401 (untyped library)
        ids, attention, mask, aux = (opened.get_slice(name)[row] for name in _KEYS)
        return DumpedStates(
            input_ids=ids,
            loss_mask=mask,
            attention_mask=attention,
            aux=_in_order(aux, order),
            last=None,
            last_is_normed=True,
            lacks_first_token=True,
        )

    return read_safetensors(file, where, slices, required=_KEYS)


def _in_order(aux: Tensor, order: Sequence[int]) -> Tensor:
    """Return aux states [T, A * H] with the layers low to high; others than these unchanged."""
    if list(order) == sorted(order) or aux.ndim != _NUM_DIMS or aux.shape[1] % len(order):
        return aux
    return aux.reshape(len(aux), len(order), -1)[:, list(order)].flatten(1)
