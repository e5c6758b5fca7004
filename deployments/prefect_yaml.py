"""`prefect.yaml` from the recipes: one deployment per flow and recipe, registered by one command.

The file is generated and committed; a test fails when it no longer matches the recipes. Parameters
are written out in full, so that the Prefect UI shows what will run and lets users change it. Each
section of a recipe appears once, below `definitions`.
"""

from typing import Any

import yaml

from deployments.automation import schedules, triggers
from deployments.recipe import Recipe, load_recipe, recipe_names
from deployments.registry import FLOWS, FlowEntry
from eagle_core.errors import ConfigError
from flows.workspace import DEFAULT_HOME

HEADER = """\
# Generated from deployments/recipes/*.yaml by `eyas render-deployments`; edit those instead.
# Register everything with: prefect --no-prompt deploy --all
"""


class _Section(dict[str, Any]):
    """A section of a recipe: written once, referenced by its anchor elsewhere."""

    def __init__(self, anchor: str, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.anchor = anchor.replace(".", "_")  # a rule of YAML


class _Dumper(yaml.SafeDumper):
    """Writes YAML whose anchors are the names of the sections."""

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 (PyYAML's own)
        super().__init__(*args, **options)
        self._names: dict[yaml.Node, str] = {}

    def represent_section(self, section: _Section) -> yaml.Node:
        node = self.represent_dict(section)
        self._names[node] = section.anchor
        return node

    def generate_anchor(self, node: yaml.Node) -> str:
        return self._names[node]


_Dumper.add_representer(_Section, _Dumper.represent_section)


def render() -> str:
    """Return the content of prefect.yaml."""
    definitions: dict[str, dict[str, _Section]] = {}
    deployments: dict[tuple[str, str], dict[str, Any]] = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        definitions[name] = _sections(recipe, name)
        for entry in FLOWS:
            deployment = _deployment(entry, name, recipe, definitions[name])
            key = (entry.name, deployment["name"])
            first = deployments.setdefault(key, deployment)
            if first["parameters"] != deployment["parameters"]:
                raise ConfigError(
                    f"recipe {name}: another recipe already defines deployment {'/'.join(key)} "
                    "with other parameters; give its data set another name"
                )
            _add_schedules(first, schedules(entry.name, recipe.automation))
    document = {
        "name": "eyas",
        "definitions": definitions,
        "deployments": list(deployments.values()),
    }
    return HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100)


def _sections(recipe: Recipe, name: str) -> dict[str, _Section]:
    """Return the sections that flows take as parameters."""
    wanted = {section for entry in FLOWS for section in entry.sections}
    values = recipe.model_dump(mode="json", include=wanted)
    return {section: _Section(f"{name}-{section}", values[section]) for section in values}


def _deployment(
    entry: FlowEntry, name: str, recipe: Recipe, sections: dict[str, _Section]
) -> dict[str, Any]:
    about = f"{recipe.target.name} on {recipe.dataset.name}"
    if "target" not in entry.sections:  # a data set serves every target
        name = about = recipe.dataset.name
    deployment: dict[str, Any] = {
        "name": name,
        "entrypoint": entry.entrypoint,
        "description": f"{entry.description} ({about}).",
        "tags": ["eyas", name],
        "parameters": {section: sections[section] for section in entry.sections},
        "work_pool": {"name": "local"},
    }
    if recipe.automation.home != DEFAULT_HOME:
        deployment["parameters"]["home"] = recipe.automation.home
    if entry.is_exclusive:
        deployment["concurrency_limit"] = {"limit": 1, "collision_strategy": "ENQUEUE"}
    starts = triggers(
        entry.name, recipe.automation, target=recipe.target.name, dataset=recipe.dataset.name
    )
    if starts:
        deployment["triggers"] = starts
    return deployment


def _add_schedules(deployment: dict[str, Any], wanted: list[dict[str, Any]]) -> None:
    """Add missing schedules; without any the key is absent, which keeps those set in the UI."""
    for schedule in wanted:
        if schedule not in deployment.setdefault("schedules", []):
            deployment["schedules"].append(schedule)
