"""The safetensors files of a model folder: list them, read their headers, load single tensors."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from eagle_core.errors import ConfigError, CorruptError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OF_SEVERAL = re.compile(r"-\d+-of-\d+$")
_POINTER = b"version https://git-lfs"
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
}
"""Bits of a value; other dtypes are taken as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """What a file's header says of one tensor."""

    dtype: str
    """As safetensors names it, such as BF16."""
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder: those that transformers loads.

    As transformers has it: model.safetensors, else the files of the index. Without both, all there
    are, sorted by name.
    """
    if _has_both(folder):
        return [folder / _SINGLE]
    weight_map = _weight_map(folder)
    if weight_map is not None:
        return [folder / name for name in sorted(set(weight_map.values()))]
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot list the weights in {folder}: {error}") from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map every tensor name of a model folder to its file; an index avoids opening the files."""
    weight_map = _weight_map(folder)
    if weight_map is not None:
        return {name: folder / file for name, file in weight_map.items()}
    remedy = "download it again"
    return {
        name: path
        for path in _loaded_files(folder, remedy=remedy)
        for name in read_header(path, remedy=remedy)
    }


def read_headers(folder: Path, *, remedy: str) -> dict[str, TensorHeader]:
    """Return what the headers say of every tensor, by name; no weight is read.

    Args:
        folder: with the safetensors files, and perhaps an index.
        remedy: how to get the files again, the end of every message.

    Raises:
        ConfigError: a file that the index names is missing, or cannot be read.
        CorruptError: a file is empty, cut or a Git LFS pointer, or lacks a tensor of the index.

    """
    by_file = {
        path: read_header(path, remedy=remedy) for path in _loaded_files(folder, remedy=remedy)
    }
    weight_map = _weight_map(folder)
    for name, file in (weight_map or {}).items():
        if name not in by_file[folder / file]:
            raise CorruptError(
                f"{folder / _INDEX} places {name} in {file}, which does not hold it; delete both, "
                f"then {remedy}"
            )
    if weight_map is not None and not isinstance(_index(folder).get("metadata"), dict):
        raise ConfigError(
            f'{folder / _INDEX} has no "metadata", which transformers reads; add "metadata": {{}}'
            f" to it, or {remedy}"
        )
    return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def read_header(path: Path, *, remedy: str) -> dict[str, TensorHeader]:
    """Return the tensors of one file by name, if the file is whole; see `read_headers`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
            file.seek(_LENGTH_BYTES)
            length = int.from_bytes(start[:_LENGTH_BYTES], "little")
            text = file.read(min(length, size))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; {remedy}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}; check it, or {remedy}") from error
    again = f"delete it, then {remedy}"
    if not size:
        raise CorruptError(f"{path} is empty; {again}")
    if start == _POINTER:
        raise CorruptError(
            f"{path} is a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull` in "
            f"its folder, or {again}"
        )
    if size < _LENGTH_BYTES + length:
        raise CorruptError(
            f"{path} is cut or no safetensors file: it has {size:,} bytes and no whole header; "
            f"{again}"
        )
    try:
        entries = json.loads(text)
        entries.pop(_METADATA, None)
        expected = _LENGTH_BYTES + length
        expected += max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {
            name: TensorHeader(dtype=entry["dtype"], shape=tuple(entry["shape"]))
            for name, entry in entries.items()
        }
        fault = _fault_of_offsets(entries)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is no safetensors file: {error!r}; {again}") from error
    if size != expected:
        raise CorruptError(
            f"{path} is cut: it has {size:,} bytes, and its header says {expected:,}; {again}"
            if size < expected
            else f"{path} has {size:,} bytes, but its header says {expected:,}; {again}"
        )
    if fault:
        raise CorruptError(f"{path} is damaged: its header {fault}; {again}")
    return tensors


def outer_tensors(names: Iterable[str], suffix: str) -> list[str]:
    """Return the tensor names that end with `suffix`, outside of the layers."""
    return [name for name in names if name.endswith(suffix) and ".layers." not in f".{name}"]


def only_tensor(names: Iterable[str], suffix: str, folder: Path) -> str:
    """Return the only tensor name that ends with `suffix`, outside of the layers.

    Layers that predict further tokens have an embedding and a head of their own. ConfigError if no
    name or several do.
    """
    matches = outer_tensors(names, suffix)
    if len(matches) != 1:
        raise ConfigError(f"{folder}: expected one tensor *{suffix}, found {matches or 'none'}")
    return matches[0]


def load_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    """Load one tensor in its stored dtype, without reading any other."""
    with safe_open(files[name], framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _loaded_files(folder: Path, *, remedy: str) -> list[Path]:
    """Return the weight files that transformers reads, which ignores others beside them."""
    paths = weight_files(folder)
    if _weight_map(folder) is not None:
        return paths
    if folder / _SINGLE in paths:
        return [folder / _SINGLE]
    if len(paths) != 1 or _OF_SEVERAL.search(paths[0].stem):
        raise ConfigError(f"{folder / _INDEX} is missing; {remedy}")
    raise ConfigError(
        f"{folder} has {paths[0].name}, but transformers reads {_SINGLE}: rename the file to it"
    )


def _has_both(folder: Path) -> bool:
    """Return whether there are a single file and an index, which then counts for nothing."""
    return (folder / _SINGLE).is_file() and (folder / _INDEX).is_file()


def _fault_of_offsets(entries: Mapping[str, Any]) -> str:
    """Return why the places of the tensors cannot be; empty if they follow each other."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            return f"places {name} at byte {first}, where {end} was expected"
        num_bits = _BITS.get(entry["dtype"])
        if num_bits is not None and (last - first) * 8 != math.prod(entry["shape"]) * num_bits:
            return (
                f"gives {name} {last - first:,} bytes, which is not {entry['dtype']} of shape "
                f"{entry['shape']}"
            )
        end = last
    return ""


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file of every tensor, as the index has it; None if no index counts."""
    if not (folder / _INDEX).is_file() or _has_both(folder):
        return None
    return _index(folder)["weight_map"]  # type: ignore[no-any-return]  # as it is checked there


def _index(folder: Path) -> dict[str, Any]:
    index = folder / _INDEX
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        weight_map = {str(name): str(file) for name, file in document["weight_map"].items()}
        return {**document, "weight_map": weight_map}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{index} is no index of weights ({error!r}); download it again"
        ) from error
