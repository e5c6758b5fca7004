"""Recipes: what ships is valid, and what is wrong is named."""

import json
from pathlib import Path

import pytest
import yaml

from deployments import prefect_yaml, recipe
from deployments.recipe import load_recipe, recipe_names
from deployments.registry import FLOWS
from eagle_core.errors import ConfigError
from tests.paths import ROOT


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name: str) -> None:
    assert load_recipe(name).target.name == name


def test_a_recipe_in_the_former_folder_is_found_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Users have files of their own there; the recipe of the new folder wins."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(recipe, "FOLDER", folder)
    monkeypatch.setattr(recipe, "FORMER_FOLDER", tmp_path)
    document = {
        "target": {"name": "mine", "model": "models/mine"},
        "dataset": {"name": "chats", "source": "chats.jsonl"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(document))
    assert recipe_names() == ["mine"]
    assert load_recipe("mine").target.model == "models/mine"
    assert "move this one there" in caplog.text
    assert str(tmp_path / "mine.yaml") in caplog.text

    caplog.clear()
    document["target"]["model"] = "models/moved"
    (folder / "mine.yaml").write_text(yaml.safe_dump(document))
    assert load_recipe("mine").target.model == "models/moved"
    assert caplog.text == ""


@pytest.mark.parametrize("path", ["deployments/smollm2.yaml", "deployments/recipes/smollm2.yaml"])
def test_a_recipe_is_found_by_its_path_of_now_and_before(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert load_recipe(path).target.name == "smollm2"


def test_prefect_yaml_is_what_the_recipes_say() -> None:
    committed = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    assert committed == prefect_yaml.render(), "run: eyas render-deployments"


def test_prefect_yaml_has_the_names_that_users_type() -> None:
    names = {
        (deployment["entrypoint"].partition(":")[2], deployment["name"])
        for deployment in yaml.safe_load(prefect_yaml.render())["deployments"]
    }
    flows = ("hidden_states", "train_flow", "evaluate_flow", "offline", "online", "estimate_flow")
    for target in recipe_names():
        for flow in (
            *flows,
            "export_flow",
            "plan",
            "verify_flow",
            "repair_flow",
            "gc_flow",
            "regenerate_flow",
        ):
            assert (flow, target) in names
    assert ("dataset_flow", "sharegpt") in names


@pytest.mark.parametrize("entry", FLOWS, ids=lambda entry: entry.name)
def test_a_flow_takes_the_sections_that_its_deployment_gives(entry: object) -> None:
    flow = entry.load()  # type: ignore[attr-defined]
    assert flow.name == entry.name  # type: ignore[attr-defined]
    parameters = set(flow.parameters.properties)
    assert set(entry.sections) <= parameters  # type: ignore[attr-defined]
    assert "home" in parameters


def test_parameters_survive_json() -> None:
    for deployment in yaml.safe_load(prefect_yaml.render())["deployments"]:
        json.dumps(deployment["parameters"])


def test_overrides_are_parsed_as_yaml() -> None:
    recipe = load_recipe(
        "smollm2", ["training.max_steps=7", "dataset.max_conversations=null", "target.device=cpu"]
    )
    assert recipe.training.max_steps == 7
    assert recipe.dataset.max_conversations is None
    assert recipe.target.device == "cpu"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.max_step=7",
            r"training\.max_step: there is no such key; known keys: .*max_steps",
        ),
        ("training.refit=true", r"training: refit adapts a given draft: .* leave refit out$"),
        ("trainig.max_steps=7", r"trainig: there is no such key; known keys: target, dataset"),
        ("training.max_steps=many", r"training\.max_steps: .*valid integer.*\(found 'many'\)"),
        ("training.learning_rate=-1", r"training\.learning_rate: .*greater than 0"),
        ("max_steps=7", r"expected section\.key=value"),
        ("training", r"expected section\.key=value"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("smollm2", [override])


def test_an_unknown_recipe_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'gpt5'; known recipes: .*llama3.*smollm2"):
        load_recipe("gpt5")


def test_a_recipe_of_ones_own_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "target: {name: mine, model: ./mine}\ndataset: {name: chats, source: chats.jsonl}\n"
    )
    assert load_recipe(str(path)).training.ttt_length == 7
    path.write_text("target: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(str(path))
    path.write_text("")
    with pytest.raises(ConfigError, match="holds no recipe: expected the sections target"):
        load_recipe(str(path))
