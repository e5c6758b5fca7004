"""Run flows in this process, check and clean up stores, list recipes, write prefect.yaml."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from deployments.cli.console import ERRORS, OUT, one_message
from deployments.cli.environment import settle_environment
from deployments.cli.preset_commands import presets
from deployments.cli.store_commands import gc, inspect, verify
from deployments.registry import FLOWS, FlowEntry, find_flow
from eagle_core.errors import ConfigError
from flows.workspace import DEFAULT_HOME

if TYPE_CHECKING:
    from deployments.recipe import Recipe

# Recipes import torch: only the commands that need a recipe import them.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe such as smollm2, or a YAML file, or the folder of a run.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override section.key=value; may be repeated.")
]
Home = Annotated[str, typer.Option(help="Folder for data, stores and runs.")]


@app.command()
def run(
    flow: Annotated[str, typer.Argument(help="Flow, such as offline or hidden-states.")],
    recipe: RecipeArgument,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    run_name: Annotated[
        str | None, typer.Option("--run", help="Name of the training run; each has its own draft.")
    ] = None,
    snapshot_id: Annotated[
        str | None,
        typer.Option("--snapshot", help="Train on this snapshot; `eyas inspect` lists them."),
    ] = None,
) -> None:
    """Run a flow in this process; no server or worker is needed."""
    own = {"run": run_name, "snapshot_id": snapshot_id}
    _run_flow(flow, recipe, overrides or [], home, {k: v for k, v in own.items() if v is not None})


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    budget: Annotated[
        str | None, typer.Option(help="Size limit of the store, such as 2TB.")
    ] = None,
    candidates: Annotated[
        bool,
        typer.Option(
            "--candidates", help="Also compare other aux layers and draft vocabularies (minutes)."
        ),
    ] = False,
) -> None:
    """Estimate the cost of hidden-states before the first shard; exit 1 if it does not fit."""
    limit = [] if budget is None else [f"store.budget={budget}"]
    own = {"candidates": True} if candidates else {}
    _run_flow("plan", recipe, [*(overrides or []), *limit], home, own)


@app.command()
def doctor(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Folder of a run, or the recipe that it was trained with (--run names one of "
            "several).",
        ),
    ],
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    run_name: Annotated[
        str | None, typer.Option("--run", help="Name of the training run of a recipe.")
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="The exported draft that is served; by default the run's own."
        ),
    ] = None,
    overfit: Annotated[
        bool,
        typer.Option(
            "--overfit",
            help="Also train a draft on four texts until it knows them, and decode these for real: "
            "proves that training and decoding agree (minutes).",
        ),
    ] = False,
) -> None:
    """Find out why the acceptance of a run is low, most likely cause first; exit 1 on a problem."""
    own = {"run": run_name, "export": export, "overfit": overfit or None}
    _run_flow("doctor", run, overrides or [], home, {k: v for k, v in own.items() if v is not None})


@app.command()
def repair(recipe: RecipeArgument, overrides: Overrides = None, home: Home = DEFAULT_HOME) -> None:
    """Recompute exactly the damaged shards of a recipe's store."""
    _run_flow("repair", recipe, overrides or [], home)


app.command()(inspect)
app.command()(verify)
app.command()(gc)
app.command()(presets)


@app.command(name="list")
def list_everything() -> None:
    """List the flows and the recipes."""
    from deployments.recipe import recipe_names  # noqa: PLC0415 (see above)

    table = Table("flow", "description", box=None, pad_edge=False)
    for entry in FLOWS:
        table.add_row(entry.name, entry.description)
    OUT.print(table)
    OUT.print(f"\nrecipes: {', '.join(recipe_names())}")
    OUT.print("run one: eyas run offline smollm2")


@app.command()
def render_deployments(
    path: Annotated[Path, typer.Argument(help="Where to write the file.")] = Path("prefect.yaml"),
) -> None:
    """Write prefect.yaml from the recipes."""
    from deployments import prefect_yaml  # noqa: PLC0415 (see above)
    from deployments.recipe import recipe_names  # noqa: PLC0415 (see above)

    with one_message():
        path.write_text(prefect_yaml.render(), encoding="utf-8")
        OUT.print(f"wrote {path}: {len(FLOWS)} flows for {len(recipe_names())} recipes")


def _run_flow(
    flow: str,
    recipe: str,
    overrides: list[str],
    home: str,
    own: Mapping[str, str | bool] | None = None,
) -> None:
    """Run a flow; `own` holds its parameters that are not sections of a recipe."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 (see above)

    with one_message(stopped="stopped; the same command resumes with what is missing"):
        entry = find_flow(flow)
        parameters = _parameters(entry, recipe, overrides, home, own or {})
        settle_environment()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        from deployments.api import (  # noqa: PLC0415 (Prefect reads its environment here)
            prefect_api,
            print_own_lines,
            print_own_warnings,
        )

        subject = parameters["target"] if "target" in parameters else parameters["dataset"]
        ERRORS.print(f"[bold]eyas[/bold] {entry.name}/{subject.name}")
        print_own_warnings()
        if not sys.stderr.isatty():  # no progress bars are shown
            print_own_lines()
        with prefect_api() as api_url:
            if api_url:
                ERRORS.print(f"reporting to {api_url.removesuffix('/api')}")
            entry.load()(**parameters)


def _parameters(
    entry: FlowEntry, recipe: str, overrides: list[str], home: str, own: Mapping[str, str | bool]
) -> dict[str, Any]:
    """Return the parameters of a flow, from a recipe or from the folder of a run."""
    from deployments.recipe import load_recipe, recipe_of_run  # noqa: PLC0415 (see above)
    from flows.bridge.run import read_run  # noqa: PLC0415 (see above)
    from flows.workspace import require_run_name  # noqa: PLC0415 (see above)

    if "run" in own and "run" not in entry.own_parameters:
        raise ConfigError(f"{entry.name} takes no run name; omit --run {own['run']}")
    if "snapshot_id" in own and "snapshot_id" not in entry.own_parameters:
        raise ConfigError(f"--snapshot is for train only; {entry.name} takes none")
    folder = Path(os.path.abspath(Path(recipe).expanduser()))  # noqa: PTH100 (resolves `..`, keeps links)
    run = read_run(folder) if folder.is_dir() else None
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


def _name_of_run(folder: Path, home: str, recipe: "Recipe") -> str:
    """Return the name of the run in `folder`, which must be where flows expect it."""
    from flows.workspace import Workspace  # noqa: PLC0415 (see above)

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
