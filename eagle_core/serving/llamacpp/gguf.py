"""Weights in llama.cpp's files, written by its own converter.

A target is converted once: its file stays in the user's cache, under its digests. A draft's file is
small, and stays beside its export.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from eagle_core.atomic_files import atomic_file, file_digest
from eagle_core.errors import ConfigError
from eagle_core.serving.llamacpp.installed import PACKAGES, VERSION, converter
from eagle_core.target.config import TargetConfig
from eagle_core.target.weights import cache_path, weight_digests

_OUT_TYPES = {"float32": "f32", "bfloat16": "bf16"}
_TAIL_LINES = 8
_DIGITS = 16
_ALSO_READ = frozenset({".json", ".jinja", ".model", ".txt"})
"""Suffixes of tokenizer, template and settings beside the weights."""
_REMOTE_CODE = "auto_map"
logger = logging.getLogger(__name__)


def target_file(config: TargetConfig, weights: Path) -> Path:
    """Return the file of a target in `config.dtype`; the first call converts it.

    Raises:
        ConfigError: llama.cpp's converter does not know this architecture, or is not installed.

    """
    path = target_path(config, weights)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("converting target %s for llama.cpp, once: %s", config.name, path)
        convert(weights, path, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    return path


def target_path(config: TargetConfig, weights: Path) -> Path:
    """Return where the file of a target is, or will be."""
    return cache_path() / "gguf" / f"{config.name}-{file_suffix(config, weights)}"


def file_suffix(config: TargetConfig, weights: Path) -> str:
    """Return the end of a file's name: dtype, and a digest of the target and llama.cpp's version.

    A draft's file depends on them as well: it has the target's tokenizer.
    """
    return f"{_OUT_TYPES[config.dtype]}-{_digest(weights)}.gguf"


def convert(
    weights: Path,
    path: Path,
    *,
    dtype: str,
    target: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Convert a model; `target` is the folder of a draft's target, whose tokenizer it gets.

    Raises:
        ConfigError: it cannot be converted, with the converter's own words; or it ships with code,
            which the converter runs.

    """
    program = converter()
    source = target or weights
    if not trust_remote_code and _ships_code(source):
        raise ConfigError(
            f"{source} ships with Python code, which llama.cpp's converter would run: set "
            "target.trust_remote_code if you trust it, or choose engine vllm"
        )
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


def _ships_code(folder: Path) -> bool:
    return any(
        _REMOTE_CODE in json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / "config.json", folder / "tokenizer_config.json")
        if path.exists()
    )


@cache
def _digest(weights: Path) -> str:
    """Return a digest of everything that the converter reads."""
    others = sorted(path for path in weights.iterdir() if path.suffix in _ALSO_READ)
    digests = [VERSION, weight_digests(weights), {path.name: file_digest(path) for path in others}]
    text = json.dumps(digests, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
