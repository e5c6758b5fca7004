"""`prefect.yaml` from the recipes: one deployment per flow and recipe, registered by one command.

The file is generated and committed; a test fails when it no longer matches the recipes. Parameters
are written out in full, so that the Prefect UI shows what will run and lets a person change it.
"""

from typing import Any

import yaml

from deployments.recipe import Recipe, load_recipe, recipe_names
from deployments.registry import FLOWS, FlowEntry
from eagle_core.errors import ConfigError

HEADER = """\
# Generated from deployments/*.yaml by `eyas render-deployments`; change those, not this file.
# Register everything with: prefect --no-prompt deploy --all
"""


def render() -> str:
    """Return the content of prefect.yaml."""
    deployments: dict[tuple[str, str], dict[str, Any]] = {}
    for name in recipe_names():
        for entry in FLOWS:
            deployment = _deployment(entry, name, load_recipe(name))
            key = (entry.name, deployment["name"])
            if deployments.setdefault(key, deployment)["parameters"] != deployment["parameters"]:
                raise ConfigError(
                    f"recipe {name}: deployment {'/'.join(key)} is already taken by another recipe "
                    "with other parameters; give its data set another name"
                )
    document = {"name": "eyas", "deployments": list(deployments.values())}
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=100)


def _deployment(entry: FlowEntry, name: str, recipe: Recipe) -> dict[str, Any]:
    about = f"{recipe.target.name} on {recipe.dataset.name}"
    if "target" not in entry.sections:  # a data set serves every target
        name = about = recipe.dataset.name
    sections = recipe.model_dump(mode="json", include=set(entry.sections))
    return {
        "name": name,
        "entrypoint": entry.entrypoint,
        "description": f"{entry.description} ({about}).",
        "tags": ["eyas", name],
        "parameters": {section: sections[section] for section in entry.sections},
        "work_pool": {"name": "local"},
    }
