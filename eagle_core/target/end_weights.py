"""The two matrices of a target that training reads: input embedding and head.

Stored in 8 bits with a scale per tensor, row or block, they are multiplied by their scale. A packed
one is refused by name: it must never be taken for a tied one.

Shapes: V target vocabulary, H hidden size.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import (
    TensorHeader,
    load_tensor,
    only_tensor,
    outer_tensors,
    tensor_files,
)

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head."
_WHOLE = frozenset({"F64", "F32", "F16", "BF16"})
_SCALED = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8"}
_SCALES = ("_scale_inv", "_scale")
"""Ends of the names of scales; values are multiplied by either."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndNames:
    """Names of the tensors of both ends."""

    embedding: str
    head: str | None
    """None if it is tied to the embedding; the embedding itself may have the head's name."""


def end_names(names: Collection[str], folder: Path) -> EndNames:
    """Return which of the tensors `names` are embedding and head.

    Raises:
        ConfigError: there is no embedding, or the head is stored as something else than a matrix.

    """
    of_head = [name for name in names if f".{_HEAD}" in f".{name}"]
    if of_head and not outer_tensors(names, _EMBEDDING):  # tied, and stored under the head's name
        both = only_tensor(of_head, f"{_HEAD}weight", folder)
        return EndNames(embedding=both, head=both)
    embedding = embedding_name(names, folder)
    of_head = _heads_beside(of_head, names, embedding)
    if of_head and not any(name.endswith(f"{_HEAD}weight") for name in of_head):
        raise ConfigError(
            f"{folder}: the head is packed ({', '.join(sorted(of_head))}), and Eyas cannot unpack "
            "it; use weights whose lm_head is not quantized"
        )
    head = only_tensor(of_head, f"{_HEAD}weight", folder) if of_head else None
    return EndNames(embedding=embedding, head=head)


def embedding_name(names: Collection[str], folder: Path) -> str:
    """Return the tensor of the input embedding; ConfigError if there is none, or no only one.

    Modules that predict further tokens may have one, too: the model's is that with most layers.
    """
    matches = outer_tensors(names, _EMBEDDING)
    if len(matches) > 1:
        sizes = {one: _num_of_layers(names, one.removesuffix(_EMBEDDING)) for one in matches}
        matches = [one for one in matches if sizes[one] == max(sizes.values())]
    return only_tensor(matches, _EMBEDDING, folder)


def _num_of_layers(names: Collection[str], prefix: str) -> int:
    """Return how many tensors the layers beside an embedding have."""
    return sum(name.startswith(f"{prefix}layers.") for name in names)


def _heads_beside(heads: Collection[str], names: Collection[str], embedding: str) -> list[str]:
    """Return `heads` without those of other modules, which have an embedding or layers too."""
    found = []
    for head in heads:
        prefix = head[: f".{head}".index(f".{_HEAD}")]
        own = (f"{prefix}{_EMBEDDING}", f"{prefix}layers.")
        if embedding.startswith(prefix) or not any(name.startswith(own) for name in names):
            found.append(head)
    return found


def require_ends(headers: Mapping[str, TensorHeader], folder: Path) -> EndNames:
    """Return the names of both ends if `load_ends` can read them; ConfigError names what it cannot.

    Decides from the headers alone.
    """
    ends = end_names(headers, folder)
    for name in filter(None, (ends.embedding, ends.head)):
        dtype = headers[name].dtype
        if dtype in _WHOLE:
            continue
        if dtype not in _SCALED.values():
            raise ConfigError(
                f"{folder}: {name} is packed as {dtype}, and Eyas cannot unpack it; use weights "
                "whose embedding and lm_head are not quantized"
            )
        _shape_of_blocks(headers[name].shape, headers[_scale_name(headers, name, folder)].shape)
    return ends


def load_ends(folder: Path, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (input embedding [V, H], lm_head [V, H]) without loading the layers between them.

    Offline training needs nothing else of the target. Tied models return the same tensor twice.
    """
    files = tensor_files(folder)
    ends = end_names(files, folder)
    embedding = _load_matrix(files, ends.embedding, folder).to(dtype)
    if ends.head is None:
        return embedding, embedding
    return embedding, _load_matrix(files, ends.head, folder).to(dtype)


def _load_matrix(files: Mapping[str, Path], name: str, folder: Path) -> Tensor:
    stored = load_tensor(files, name)
    if stored.dtype not in _SCALED:
        return stored
    scale = load_tensor(files, _scale_name(files, name, folder)).float()
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    rows, columns = _shape_of_blocks(stored.shape, scale.shape)
    return stored.float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _scale_name(names: Collection[str], name: str, folder: Path) -> str:
    found = next((f"{name}{end}" for end in _SCALES if f"{name}{end}" in names), None)
    if found is None or f"{name}_zero_point" in names:
        how = "with a zero point" if found else "without a scale"
        raise ConfigError(
            f"{folder}: {name} is stored in 8 bits {how}, which Eyas cannot read; use weights "
            "whose embedding and lm_head are not quantized"
        )
    return found


def _shape_of_blocks(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """Return how many rows and columns share one scale."""
    num_rows, num_columns = scales if len(scales) == 2 else (math.prod(scales), 1)
    if shape[0] % num_rows or shape[1] % num_columns:
        raise ConfigError(
            f"a matrix of shape {tuple(shape)} has scales of shape {tuple(scales)}, which do not "
            "divide it; use weights whose embedding and lm_head are not quantized"
        )
    return shape[0] // num_rows, shape[1] // num_columns
