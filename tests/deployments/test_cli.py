"""The `eyas` command as a person meets it, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]


def eyas(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the repository root."""
    return subprocess.run(
        [sys.executable, "-m", "deployments", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
    )


def test_list_names_flows_and_recipes() -> None:
    ended = eyas("list")
    assert ended.returncode == 0
    assert "hidden-states" in ended.stdout
    recipes = {path.stem for path in (ROOT / "deployments").glob("*.yaml")}
    assert {"llama3", "smollm2"} <= recipes
    words = set(ended.stdout.replace(",", " ").split())
    assert recipes <= words, f"not listed: {recipes - words}"


def test_a_wrong_key_is_one_message_without_traceback() -> None:
    ended = eyas("run", "offline", "smollm2", "--set", "training.max_step=3")
    assert ended.returncode == 1
    assert "training.max_step: there is no such key" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_name_where_there_is_no_run_is_refused() -> None:
    ended = eyas("run", "hidden-states", "smollm2", "--run", "wide")
    assert ended.returncode == 1
    assert "hidden-states belongs to no run; leave out --run wide" in ended.stderr


def test_missing_weights_are_one_message_with_the_next_command(tmp_path: Path) -> None:
    source = tiny.write_conversations(tmp_path / "tiny.json", 6)
    ended = eyas(
        "run",
        "hidden-states",
        "llama3",
        "--home",
        str(tmp_path / "home"),
        "--set",
        f"target.model={tmp_path / 'models' / 'llama3'}",
        "--set",
        f"dataset.source={source}",
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ConfigError: target llama3: no model folder at")
    assert "hf download" in last


@pytest.mark.slow
def test_offline_runs_without_a_server_and_prints_one_table(
    tmp_path: Path, tiny_target_path: Path
) -> None:
    source = tiny.write_conversations(tmp_path / "tiny.json", 60)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"""
target: {{name: tiny, model: {tiny_target_path}, dtype: float32, device: cpu}}
dataset: {{name: facts, source: {source}, held_out_fraction: 0.2, max_length: 256}}
store: {{shard_tokens: 2000}}
training: {{draft_vocab_size: 300, max_steps: 20, batch_tokens: 512, warmup_steps: 2}}
evaluation: {{num_prompts: 3, max_new_tokens: 12}}
"""
    )
    ended = eyas("run", "offline", str(recipe), "--home", str(tmp_path / "home"))
    assert ended.returncode == 0, ended.stderr
    for expected in (
        "bytes per token, stored",
        "acceptance length, trained",
        "tensorboard --logdir",
    ):
        assert expected in ended.stdout
