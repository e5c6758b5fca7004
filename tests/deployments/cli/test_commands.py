"""The `eyas` command: what it prints, and how it fails."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
import yaml

from deployments.cli.environment import settle_environment
from flows.reports.run_record import RunRecord
from tests import tiny
from tests.deployments.cli.terminal import ROOT, eyas, eyas_here


@pytest.mark.slow
def test_list_names_flows_and_recipes() -> None:
    ended = eyas("list")
    assert ended.returncode == 0
    assert "hidden-states" in ended.stdout
    recipes = {path.stem for path in (ROOT / "deployments" / "recipes").glob("*.yaml")}
    assert {"llama3", "smollm2"} <= recipes
    words = set(ended.stdout.replace(",", " ").split())
    assert recipes <= words, f"not listed: {recipes - words}"


def test_a_wrong_key_is_one_message_without_traceback() -> None:
    ended = eyas_here("run", "offline", "smollm2", "--set", "training.max_step=3")
    assert ended.returncode == 1
    assert "training.max_step: there is no such key" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_name_where_there_is_no_run_is_refused() -> None:
    ended = eyas_here("run", "hidden-states", "smollm2", "--run", "wide")
    assert ended.returncode == 1
    assert "hidden-states takes no run name; omit --run wide" in ended.stderr


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


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prefect.db").write_bytes(b"no database at all, but long enough to be read" * 100)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "")
    ended = eyas("run", "dataset", "smollm2", "--home", str(tmp_path / "home"))
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ServerFailedError: Prefect's temporary server exited after")
    assert f"{tmp_path / 'prefect.db'} is damaged or from another version" in last
    assert "file is not a database" in last


def test_a_proxy_for_the_web_is_none_for_servers_of_this_machine() -> None:
    for lower, upper, expected in (
        (None, "intranet, 127.0.0.1", "intranet,127.0.0.1,localhost,::1"),
        ("lower", "upper", "lower,127.0.0.1,localhost,::1"),
        (None, "*", "*"),
        (None, None, "127.0.0.1,localhost,::1"),
    ):
        with mock.patch.dict(os.environ):
            for name, value in (("no_proxy", lower), ("NO_PROXY", upper)):
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
            settle_environment()
            assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == expected


def write_recipe(
    folder: Path, target: Path, source: Path, training: Mapping[str, int], **dataset: float
) -> Path:
    """Write a recipe of the tiny target; return its path."""
    recipe = folder / "tiny.yaml"
    sections = {
        "target": {"name": "tiny", "model": str(target), "dtype": "float32", "device": "cpu"},
        "dataset": {"name": "facts", "source": str(source), "max_length": 256, **dataset},
        "training": dict(training),
    }
    recipe.write_text(yaml.safe_dump(sections))
    return recipe


@pytest.mark.server
@pytest.mark.usefixtures("prefect_server")
def test_the_folder_of_a_run_is_all_that_a_command_needs(
    tmp_path: Path, tiny_target_path: Path
) -> None:
    source = tiny.write_conversations(tmp_path / "tiny.json", 12)
    home = tmp_path / "home"
    training: Mapping[str, int] = {"draft_vocab_size": 300, "ttt_length": 2, "max_steps": 1}
    recipe = write_recipe(tmp_path, tiny_target_path, source, training)
    for flow in (("hidden-states",), ("train", "--run", "one")):
        ended = eyas_here("run", flow[0], str(recipe), *flow[1:], "--home", str(home))
        assert ended.returncode == 0, ended.stderr
    recipe.unlink()
    source.unlink()
    folder = home / "runs" / "tiny-facts-one"
    longer = ("run", "train", str(folder), "--set", "training.max_steps=2")
    ended = eyas_here(*longer)
    assert ended.returncode != 0
    assert "training.extend=keep" in ended.stderr
    assert "training.extend=restretch" in ended.stderr
    ended = eyas_here(*longer, "--set", "training.extend=restretch")
    assert ended.returncode == 0, ended.stderr
    trained = RunRecord.read(folder).training
    assert trained is not None
    assert trained.num_steps == 2
    assert eyas_here("run", "export", str(folder)).returncode == 0
    assert (folder / "export" / "serving").is_dir()
    copied, old = folder.with_name("backup"), folder.with_name("tiny-facts-old")
    for copy in (copied, old):
        shutil.copytree(folder, copy)
    (old / "run.json").unlink()
    for arguments, expected in (
        (
            ("train", str(copied)),
            "but flows expect it at HOME/runs/tiny-facts-NAME: move or rename",
        ),
        (
            ("train", str(folder), "--set", "dataset.name=other"),
            "do not change target.name or dataset",
        ),
        (("train", str(old)), "from an older version: name the recipe and --run"),
        (("export", str(folder), "--run", "two"), "already names the run: omit --run"),
        (("plan", str(folder)), "plan takes no run: name a recipe instead of"),
        (("export", str(home)), "or the folder of a run"),
        (
            ("export", "smollm2", "--snapshot", "feed"),
            "--snapshot is for train only; export takes none",
        ),
    ):
        refused = eyas_here("run", *arguments)
        assert refused.returncode == 1
        assert expected in refused.stderr


@pytest.mark.server
@pytest.mark.usefixtures("prefect_server")
def test_plan_compares_candidates_where_it_is_told_to(
    tmp_path: Path, tiny_target_path: Path
) -> None:
    source = tiny.write_conversations(tmp_path / "tiny.json", 60)
    recipe = write_recipe(
        tmp_path, tiny_target_path, source, {"draft_vocab_size": 350}, held_out_fraction=0.3
    )
    arguments = ("plan", str(recipe), "--home", str(tmp_path / "home"))
    plain = eyas_here(*arguments)
    assert plain.returncode == 0, plain.stderr
    assert "Candidates" not in plain.stdout
    compared = eyas_here(*arguments, "--candidates")
    assert compared.returncode == 0, compared.stderr
    assert "Candidates: aux layers of tiny on facts" in compared.stdout
    assert "vocabulary of 350" in compared.stdout  # of the recipe
