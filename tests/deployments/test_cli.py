"""The `eyas` command: what it prints, and how it fails."""

from pathlib import Path

import pytest

from tests import tiny
from tests.deployments.terminal import ROOT, eyas, eyas_here


@pytest.mark.slow
def test_list_names_flows_and_recipes() -> None:
    ended = eyas("list")
    assert ended.returncode == 0
    assert "hidden-states" in ended.stdout
    recipes = {path.stem for path in (ROOT / "deployments").glob("*.yaml")}
    assert {"llama3", "smollm2"} <= recipes
    words = set(ended.stdout.replace(",", " ").split())
    assert recipes <= words, f"not listed: {recipes - words}"


@pytest.mark.slow
def test_a_wrong_key_is_one_message_without_traceback() -> None:
    ended = eyas("run", "offline", "smollm2", "--set", "training.max_step=3")
    assert ended.returncode == 1
    assert "training.max_step: there is no such key" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_name_where_there_is_no_run_is_refused() -> None:
    ended = eyas_here("run", "hidden-states", "smollm2", "--run", "wide")
    assert ended.returncode == 1
    assert "hidden-states belongs to no run; leave out --run wide" in ended.stderr


@pytest.mark.server
@pytest.mark.usefixtures("prefect_server")
def test_missing_weights_are_one_message_with_the_next_command(tmp_path: Path) -> None:
    source = tiny.write_conversations(tmp_path / "tiny.json", 6)
    ended = eyas_here(
        *("run", "hidden-states", "llama3", "--home", str(tmp_path / "home")),
        *("--set", f"target.model={tmp_path / 'models' / 'llama3'}"),
        *("--set", f"dataset.source={source}"),
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ConfigError: target llama3: no model folder at")
    assert "hf download" in last
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["../../x", "", ".hidden", "a/b", "two words"])
def test_a_run_name_that_leaves_the_home_is_refused(tmp_path: Path, name: str) -> None:
    ended = eyas_here("run", "train", "smollm2", "--run", name, "--home", str(tmp_path / "home"))
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith(f"ConfigError: {name!r} cannot be")
    assert not list(tmp_path.iterdir())
