"""What SIGTERM does to a run: training writes a checkpoint, and nothing that follows runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from storage.maintenance.verify import verify_store
from storage.store import Store
from tests import tiny
from tests.deployments.cli.terminal import ROOT, eyas_here
from tests.waiting import LIMIT_SECONDS, wait_for

pytestmark = [pytest.mark.server, pytest.mark.slow]


_SMALL_SHARDS = "store: {shard_tokens: 400, shards_per_task: 3}"


def _recipe(
    tmp_path: Path, target: Path, *, num_conversations: int = 40, sections: str = ""
) -> str:
    source = tiny.write_conversations(tmp_path / "tiny.json", num_conversations)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"""
target: {{name: tiny, model: {target}, dtype: float32, device: cpu}}
dataset: {{name: facts, source: {source}, held_out_fraction: 0.2, max_length: 256}}
{sections}
"""
    )
    return str(recipe)


def _wait_for(child: "subprocess.Popen[str]", condition: Callable[[], bool], *, what: str) -> None:
    """Poll until the condition holds or the child has ended, which is an error."""
    wait_for(lambda: condition() or child.poll() is not None, what=what, every_seconds=0.05)
    assert child.poll() is None, child.communicate()


def _training(max_steps: int) -> str:
    return f"""
training: {{draft_vocab_size: 300, max_steps: {max_steps}, batch_tokens: 512, checkpoint_every: 5}}
evaluation: {{num_prompts: 2, max_new_tokens: 4}}
"""


@pytest.mark.usefixtures("prefect_server")
def test_a_stopped_training_is_no_completed_run_and_is_not_evaluated(
    tmp_path: Path, tiny_target_path: Path
) -> None:
    home = tmp_path / "home"
    recipe = _recipe(tmp_path, tiny_target_path, sections=_training(100_000))
    child = subprocess.Popen(
        [sys.executable, "-m", "deployments", "run", "offline", recipe, "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    _wait_for(child, lambda: bool(list(home.rglob("step-*"))), what="the first checkpoint")
    child.send_signal(signal.SIGTERM)
    stdout, stderr = child.communicate(timeout=LIMIT_SECONDS)
    assert child.returncode == 1, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("TrainingStoppedError: training tiny-facts-main was stopped at step ")
    assert "run the same command again" in last
    assert "acceptance" not in stdout
    assert not list(home.rglob("evaluation.json"))

    # The same run, shortened to where it stopped, is complete: evaluation goes on from there.
    step = int(last.partition("at step ")[2].split()[0])
    shorter = _recipe(tmp_path, tiny_target_path, sections=_training(step))
    ended = eyas_here("run", "offline", shorter, "--home", str(home))
    assert ended.returncode == 0, ended.stderr
    assert list(home.rglob("evaluation.json"))
    for expected in (
        "bytes per token, stored",
        "acceptance length, trained",
        "tensorboard --logdir",
    ):
        assert expected in ended.stdout


@pytest.mark.parametrize(("to_all", "wanted"), [(False, signal.SIGTERM), (True, signal.SIGINT)])
def test_a_stopped_generation_leaves_no_process_and_whole_shards(
    tmp_path: Path,
    tiny_target_path: Path,
    prefect_server: str,
    *,
    to_all: bool,
    wanted: signal.Signals,
) -> None:
    """A scheduler sends SIGTERM to the command, a terminal SIGINT to all of its processes.

    The first run has a temporary server to end, the second reports to one that was there before.
    """
    server = {"PREFECT_API_URL": prefect_server} if to_all else {}
    recipe = _recipe(
        tmp_path,
        tiny_target_path,
        num_conversations=300,
        sections=_SMALL_SHARDS,
    )
    home = tmp_path / "home"
    command = ("run", "hidden-states", recipe, "--home", str(home))
    child = subprocess.Popen(
        [sys.executable, "-m", "deployments", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **server},
        start_new_session=True,
    )
    commits = home / "stores"
    _wait_for(child, lambda: len(list(commits.glob("*/commits/*.json"))) >= 3, what="three shards")
    (os.killpg if to_all else os.kill)(child.pid, wanted)
    # Whoever lived on would hold the pipes open.
    _, stderr = child.communicate(timeout=LIMIT_SECONDS)
    assert child.returncode == 130, stderr
    assert stderr.strip().endswith("stopped; the same command resumes with what is missing")
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    (root,) = (home / "stores").iterdir()
    store = Store.open(str(root))
    made = len(store.commits())
    assert 3 <= made < 90
    assert verify_store(store, deep=True) == []


def test_a_kill_leaves_no_process_behind(
    tmp_path: Path, tiny_target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "")
    home = tmp_path / "home"
    recipe = _recipe(tmp_path, tiny_target_path, num_conversations=300, sections=_SMALL_SHARDS)
    child = subprocess.Popen(
        [sys.executable, "-m", "deployments", "run", "hidden-states", recipe, "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    _wait_for(child, lambda: bool(list(home.rglob("commits/*.json"))), what="the first shard")
    below = psutil.Process(child.pid).children(recursive=True)
    servers = [one for one in below if "deployments.cli.temporary_server" in one.cmdline()]
    assert len(servers) == 1
    assert len(below) > 1, "the shards are made in a process"
    child.kill()
    child.communicate()
    _, living = psutil.wait_procs(below, timeout=LIMIT_SECONDS)
    assert not living
