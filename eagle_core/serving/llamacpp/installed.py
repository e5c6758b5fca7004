"""Where llama.cpp is: its server on PATH or in the user's cache, its converter in the cache."""

import shutil
from pathlib import Path

from eagle_core.errors import ConfigError
from eagle_core.target.weights import cache_path

VERSION = "11434"
"""Build number of llama.cpp: what was tested."""
SERVER = "llama-server"
PACKAGES = "packages"
"""Folder beside the converter: what it imports, and this environment need not have."""
INSTALL = "eyas engines install llamacpp"


def folder() -> Path:
    """Return where `eyas engines install llamacpp` puts it."""
    return cache_path() / "engines" / f"llamacpp-{VERSION}"


def server() -> Path:
    """Return the server: the one that was built here, which is tested, else the first on PATH.

    Raises:
        ConfigError: there is none.

    """
    built = folder() / "bin" / SERVER
    if built.exists():
        return built
    on_path = shutil.which(SERVER)
    if on_path is None:
        raise ConfigError(f"llama.cpp is not here: run `{INSTALL}`, or put {SERVER} on PATH")
    return Path(on_path)


def converter() -> Path:
    """Return the program that writes GGUF files.

    Raises:
        ConfigError: it is not installed.

    """
    found = folder() / "source" / "convert_hf_to_gguf.py"
    if not found.exists():
        raise ConfigError(
            f"weights must be converted for llama.cpp, and its converter is not here: run "
            f"`{INSTALL}`"
        )
    return found
