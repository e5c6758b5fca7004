"""The safetensors files of a model folder: list them and load single tensors."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from eagle_core.errors import ConfigError

_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, sorted by name."""
    index = folder / _INDEX
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot list the weights in {folder}: {error}") from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map every tensor name of a model folder to its file; an index avoids opening the files."""
    index = folder / _INDEX
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def only_tensor(names: Mapping[str, Path], suffix: str, folder: Path) -> str:
    """Return the only tensor name that ends with `suffix`; ConfigError if none or several do."""
    matches = [name for name in names if name.endswith(suffix)]
    if len(matches) != 1:
        raise ConfigError(f"{folder}: expected one tensor *{suffix}, found {matches or 'none'}")
    return matches[0]


def load_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    """Load one tensor in its stored dtype, without reading any other."""
    with safe_open(files[name], framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
