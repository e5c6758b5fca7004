"""The contracts between packages: each is seen to break when it is broken on purpose."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS

PACKAGES = ("storage", "eagle_core", "flows", "deployments")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
BREAKS = {
    "deployments -> flows -> {eagle_core | storage}, one way": (
        "storage/errors.py",
        "import eagle_core.errors",
    ),
    "storage: each line imports only lines below it": (
        "storage/records/plan.py",
        "import storage.maintenance.gc",
    ),
    "eagle_core: each line imports only lines below it": (
        "eagle_core/draft/model.py",
        "import eagle_core.target.weights",
    ),
    "flows: each line imports only lines below it": (
        "flows/reports/plots.py",
        "import flows.tasks.prepare",
    ),
    "deployments: each line imports only lines below it": (
        "deployments/registry.py",
        "import deployments.cli.console",
    ),
    "eagle_core imports no prefect and no store": (
        "eagle_core/training/schedule.py",
        "import zarr",
    ),
    "storage imports no torch, no transformers, no prefect": ("storage/samples.py", "import torch"),
    "bridge, workers and reports import no prefect": (
        "flows/bridge/recompute.py",
        "import prefect",
    ),
    "no two modules import each other": (
        "eagle_core/data/splits.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import eagle_core.data.build",
    ),
}


def _broken(folder: Path) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return set(re.findall(r"^(.+) BROKEN", done.stdout, re.MULTILINE))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and their contracts in a folder of their own."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "recipes", "*.html")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_each_contract_breaks(copy: Path) -> None:
    settings = tomllib.loads((copy / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert {contract["name"] for contract in settings["contracts"]} == BREAKS.keys()
    assert _broken(copy) == set()
    for name, (module, statement) in BREAKS.items():
        source = (copy / module).read_text()
        (copy / module).write_text(f"{source}\n{statement}\n")
        assert name in _broken(copy), f"{statement} in {module} goes unnoticed"
        (copy / module).write_text(source)
