"""Weights of a hub's model: fetched by who needs them, and looked for without fetching."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from tests.hub import Repository, serve_hub
from tests.paths import ROOT

LOOK = """
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
target = TargetConfig(name="small", model="org/small")
print(weights.are_here(target))
described = weights.locate_description(target)
print(sorted(path.name for path in described.iterdir()), weights.are_here(target))
fetched = weights.locate(target)
print(sorted(path.name for path in fetched.iterdir()), weights.are_here(target))
"""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
DESCRIPTION = {"config.json": b"{}", "model.safetensors.index.json": INDEX, "tokenizer.json": b"{}"}


@pytest.mark.slow
def test_a_model_of_the_hub_is_here_once_its_weights_are(tmp_path: Path) -> None:
    others = {"README.md": b"# Small", "original/consolidated.pth": b"0" * 99}
    repository = Repository(files=DESCRIPTION | dict.fromkeys(SHARDS, b"0" * 64) | others)
    with serve_hub({"org/small": repository}) as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", LOOK],
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    before, described, fetched = done.stdout.splitlines()
    assert before == "False"
    assert described == f"{sorted(DESCRIPTION)} False"
    assert fetched == f"{sorted([*DESCRIPTION, *SHARDS])} True"


def test_an_index_alone_is_no_weights(tmp_path: Path) -> None:
    target = TargetConfig(name="small", model=str(tmp_path))
    for name, data in DESCRIPTION.items():
        (tmp_path / name).write_bytes(data)
    assert not weights.are_here(target)
    (tmp_path / SHARDS[1]).touch()
    assert weights.are_here(target), "what reads them says which are missing"
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert weights.are_here(target), "what reads it says that it is damaged"
