"""Weights in llama.cpp's files, written by its own converter.

A target is converted once: its file stays in the user's cache, under its digests. A draft is small
and converted for each use.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from eagle_core.atomic_files import atomic_file
from eagle_core.errors import ConfigError
from eagle_core.serving.llamacpp.installed import PACKAGES, VERSION, converter
from eagle_core.target.config import TargetConfig
from eagle_core.target.weights import cache_path, weight_digests

_OUT_TYPES = {"float32": "f32", "bfloat16": "bf16"}
_TAIL_LINES = 8
_DIGITS = 16
logger = logging.getLogger(__name__)


def target_file(config: TargetConfig, weights: Path) -> Path:
    """Return the file of a target in `config.dtype`; the first call converts it.

    Raises:
        ConfigError: llama.cpp's converter does not know this architecture, or is not installed.

    """
    name = f"{config.name}-{_OUT_TYPES[config.dtype]}-{_digest(weights)}.gguf"
    path = cache_path() / "gguf" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("converting target %s for llama.cpp, once: %s", config.name, path)
        convert(weights, path, dtype=config.dtype)
    return path


def convert(weights: Path, path: Path, *, dtype: str, target: Path | None = None) -> None:
    """Convert a model; `target` is the folder of a draft's target, whose tokenizer it gets.

    Raises:
        ConfigError: it cannot be converted; with the converter's own words.

    """
    program = converter()
    imports = [program.parent / "gguf-py", program.parent / PACKAGES]
    with atomic_file(path) as partial:
        command = [str(program), str(weights), "--outfile", str(partial)]
        command += ["--outtype", _OUT_TYPES[dtype]]
        command += [] if target is None else ["--target-model-dir", str(target)]
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, imports))},
        )
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            printed = "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])
            raise ConfigError(f"llama.cpp's converter refuses {weights}:{printed}")


@cache
def _digest(weights: Path) -> str:
    digests = json.dumps([VERSION, weight_digests(weights)], sort_keys=True)
    return hashlib.sha256(digests.encode()).hexdigest()[:_DIGITS]
