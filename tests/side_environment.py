"""Environments for packages that cannot live in this one: built once, kept beside `.venv`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import needs
from tests.paths import ROOT


def side_environment(name: str, *installs: Sequence[str]) -> Path:
    """Return the interpreter of `.venv-NAME`, which imports this environment's packages too.

    Each of `installs` is what `pip install` is given, one after the other. The environment is built
    anew when they, the constraints or this environment change. Where a package cannot be had the
    test is skipped, or fails in CI.
    """
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    contents = json.dumps([installs, sys.prefix, sys.version, constraints.read_text()])
    marker = folder / "contents.json"
    if marker.exists() and marker.read_text() == contents:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "host.pth").write_text(sysconfig.get_path("purelib"))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in installs:
        command = [*pip, "-c", constraints, *packages]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            stop(f"{needs.PREFIX}{name} from the package index: {done.stderr.strip()[-200:]}")
    marker.write_text(contents)
    return python
