"""The RECIPE or RUN that commands take: a recipe's name, its file, or the folder of a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.recipe import Recipe, load_recipe, recipe_of_run
from deployments.registry import FlowEntry
from eagle_core.errors import ConfigError
from flows.workspace import DEFAULT_HOME, Workspace, require_run_name

if TYPE_CHECKING:
    from flows.bridge.run import Run

# Records of runs import torch: only the commands that are given a run import them.

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Folder of a run, or the recipe that it was trained with (--run names one of "
        "several).",
    ),
]
RunNameOption = Annotated[
    str | None, typer.Option("--run", help="Name of the training run of a recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override section.key=value; may be repeated.")
]
Home = Annotated[str, typer.Option(help="Folder for data, stores and runs.")]


def parameters_of(
    entry: FlowEntry,
    recipe: str,
    overrides: list[str],
    home: str,
    own: Mapping[str, str | bool | int],
) -> dict[str, Any]:
    """Return the parameters of a flow, from a recipe or from the folder of a run."""
    if "run" in own and "run" not in entry.own_parameters:
        raise ConfigError(f"{entry.name} takes no run name; omit --run {own['run']}")
    if "snapshot_id" in own and "snapshot_id" not in entry.own_parameters:
        raise ConfigError(f"--snapshot is for train only; {entry.name} takes none")
    folder = Path(os.path.abspath(Path(recipe).expanduser()))  # noqa: PTH100 (resolves `..`, keeps links)
    run = _read_run(folder) if folder.is_dir() else None
    if run is None and (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{recipe} is the folder of a run without run.json, from an older version: name the "
            "recipe and --run; resuming it with train writes that file"
        )
    if run is None:
        loaded = load_recipe(recipe, overrides)
    elif "run" not in entry.own_parameters:
        raise ConfigError(f"{entry.name} takes no run: name a recipe instead of {recipe}")
    elif "run" in own or home != DEFAULT_HOME:
        raise ConfigError(f"{recipe} already names the run: omit --run and --home")
    else:
        loaded, home = recipe_of_run(run, folder, overrides), str(folder.parents[1])
        own = {**own, "run": _name_of_run(folder, home, loaded)}
    if "run" in own:
        require_run_name(str(own["run"]))
    return {section: getattr(loaded, section) for section in entry.sections} | {**own, "home": home}


def _read_run(folder: Path) -> "Run | None":
    from flows.bridge.run import read_run  # noqa: PLC0415 (see above)

    return read_run(folder)


def _name_of_run(folder: Path, home: str, recipe: Recipe) -> str:
    """Return the name of the run in `folder`, which must be where flows expect it."""
    target, dataset = recipe.target.name, recipe.dataset.name
    name = folder.name.removeprefix(f"{target}-{dataset}-")
    expected = Workspace.at(home, target=target, dataset=dataset).run_path(name)
    if expected != folder:
        raise ConfigError(
            f"the run of {target} on {dataset} is in {folder}, but flows expect it at "
            f"HOME/runs/{target}-{dataset}-NAME: move or rename its folder, and do not change "
            "target.name or dataset.name"
        )
    return name
