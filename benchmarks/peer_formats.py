"""Hidden-state formats of other tools, implemented from the descriptions of these formats.

Each format stores what its tool stores of the same conversations, padding and repeated rows
included:

* `torch.save`: SpecForge, one file per sample; samples are stored with the padding of their batch.
* `torch.save + gzip`: the same with its `--compress`.
* `safetensors`: speculators, one file per row, one row per assistant turn with everything before.
* `memmap`: flat files of everything, the minimum of an uncompressed store.

Like their tools, the first three neither sync to disk nor check anything when reading.
"""

import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.samples import StoredSample

BATCH_SAMPLES = 32
MEMMAP_STATES = ("aux", "last")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerFormat:
    """A format that writes all samples below a folder, and reads them back."""

    name: str
    write: Callable[[Sequence[StoredSample], Path], None]
    read: Callable[[Path], int]
    """Returns the number of items read; every byte of them is then in memory."""


def _bfloat16(bits: NDArray[np.uint16]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)


def _padded_rows(values: NDArray[np.uint16], length: int) -> NDArray[np.uint16]:
    """Return rows padded at the end with values as hard to compress as states."""
    rng = np.random.default_rng(len(values))
    return np.concatenate([values, values[rng.integers(0, len(values), length - len(values))]])


def padded_tokens(samples: Sequence[StoredSample]) -> int:
    """Return the tokens of all batches, each padded to its longest sample."""
    lengths = [len(sample) for sample in samples]
    batches = (lengths[i : i + BATCH_SAMPLES] for i in range(0, len(lengths), BATCH_SAMPLES))
    return sum(max(batch) * len(batch) for batch in batches)


def _torch_documents(samples: Sequence[StoredSample]) -> list[dict[str, Tensor]]:
    documents = []
    for first in range(0, len(samples), BATCH_SAMPLES):
        batch = samples[first : first + BATCH_SAMPLES]
        length = max(len(sample) for sample in batch)
        for sample in batch:
            pad = (0, length - len(sample))
            aux = _padded_rows(sample.aux_hidden_states.reshape(len(sample), -1), length)
            documents.append(
                {
                    "input_ids": torch.from_numpy(np.pad(sample.input_ids, pad).astype(np.int64)),
                    "loss_mask": torch.from_numpy(np.pad(sample.loss_mask, pad).astype(np.int64)),
                    "hidden_state": _bfloat16(_padded_rows(sample.last_hidden_state, length))[None],
                    "aux_hidden_state": _bfloat16(aux)[None],
                }
            )
    return documents


def _write_torch(samples: Sequence[StoredSample], folder: Path) -> None:
    for number, document in enumerate(_torch_documents(samples)):
        torch.save(document, folder / f"{number}.ckpt")


def _read_torch(folder: Path) -> int:
    paths = list(folder.glob("*.ckpt"))
    for path in paths:
        torch.load(path, weights_only=True)
    return len(paths)


def _write_gzip(samples: Sequence[StoredSample], folder: Path) -> None:
    for number, document in enumerate(_torch_documents(samples)):
        buffer = io.BytesIO()
        torch.save(document, buffer)
        with gzip.open(folder / f"{number}.ckpt.gz", "wb", compresslevel=6) as file:
            file.write(buffer.getbuffer())


def _read_gzip(folder: Path) -> int:
    paths = list(folder.glob("*.ckpt.gz"))
    for path in paths:
        with gzip.open(path, "rb") as file:
            torch.load(io.BytesIO(file.read()), weights_only=True)
    return len(paths)


def turn_ends(sample: StoredSample) -> NDArray[np.int64]:
    """Return the end of each assistant turn, where a row of the speculators format ends."""
    return np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8), append=0) == -1) + 1


def _write_safetensors(samples: Sequence[StoredSample], folder: Path) -> None:
    number = 0
    for sample in samples:
        last = sample.last_hidden_state[:, None]
        states = _bfloat16(np.concatenate([sample.aux_hidden_states, last], axis=1))
        for end in turn_ends(sample).tolist():
            row = {
                "hidden_states": states[:end].contiguous(),
                "token_ids": torch.from_numpy(sample.input_ids[:end].astype(np.int64)),
            }
            save_file(row, folder / f"hs_{number}.safetensors")
            number += 1


def _read_safetensors(folder: Path) -> int:
    paths = list(folder.glob("*.safetensors"))
    for path in paths:
        for tensor in load_file(path).values():
            tensor.clone()  # it is a view of a file that is not yet read
    return len(paths)


def _write_memmap(samples: Sequence[StoredSample], folder: Path) -> None:
    ends = np.cumsum([0, *(len(sample) for sample in samples)])
    arrays: dict[str, list[NDArray[Any]]] = {
        "aux": [sample.aux_hidden_states for sample in samples],
        "last": [sample.last_hidden_state for sample in samples],
        "input_ids": [sample.input_ids for sample in samples],
        "loss_mask": [sample.loss_mask for sample in samples],
        "ends": [ends],
    }
    for name, parts in arrays.items():
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        whole = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=parts[0].dtype, shape=shape
        )
        np.concatenate(parts, out=whole)
        whole.flush()


def _read_memmap(folder: Path) -> int:
    ends = np.load(folder / "ends.npy")
    states = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in MEMMAP_STATES]
    for first, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        for array in states:
            array[first:stop].copy()
    return len(ends) - 1


PEERS = (
    PeerFormat(name="torch.save per sample", write=_write_torch, read=_read_torch),
    PeerFormat(name="torch.save + gzip", write=_write_gzip, read=_read_gzip),
    PeerFormat(name="safetensors per row", write=_write_safetensors, read=_read_safetensors),
    PeerFormat(name="flat memmap", write=_write_memmap, read=_read_memmap),
)
