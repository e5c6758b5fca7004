"""What a start need not load is not loaded: seconds of every command, server and flow."""

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS


def _loaded(module: str, names: list[str]) -> list[str]:
    """Return which of some modules are loaded by the import of one."""
    script = (
        f"import json, sys, {module}; print(json.dumps([n for n in {names!r} if n in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("deployments.cli.temporary_server", ["deployments.cli.commands", "typer", "storage"]),
        ("deployments.cli.commands", ["torch", "transformers", "prefect", "zarr", "pyarrow"]),
        ("deployments.recipe", ["torch", "transformers", "prefect", "pyarrow"]),
        ("flows.train", ["torch.distributed.fsdp", "torch._dynamo", "torch.utils.tensorboard"]),
    ],
)
def test_an_import_does_not_load(module: str, names: list[str]) -> None:
    assert _loaded(module, [module, *names]) == [module]


def test_a_command_installed_by_an_earlier_version_finds_its_app() -> None:
    """Its script says `from deployments.cli import app`, and calls that."""
    assert _loaded("deployments.cli", ["deployments.cli.commands"]) == []
    script = "from deployments.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    assert "render-deployments" in done.stdout
