"""Run a flow here and now, look after stores, list what there is, write prefect.yaml."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deployments.console import ERRORS, OUT, one_message
from deployments.environment import settle_environment
from deployments.registry import FLOWS, find_flow
from deployments.store_commands import gc, inspect, verify
from eagle_core.errors import ConfigError
from flows.workspace import DEFAULT_HOME

# Recipes bring torch with them: only the commands that need one import them.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe, such as smollm2, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, as often as you like.")
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
) -> None:
    """Run a flow in this process; no server or worker needed."""
    _run_flow(flow, recipe, overrides or [], home, run_name=run_name)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    budget: Annotated[
        str | None, typer.Option(help="Most bytes that the store may take, such as 2TB.")
    ] = None,
) -> None:
    """Say what hidden-states would cost, before the first shard; exit 1 if it does not fit."""
    limit = [] if budget is None else [f"store.budget={budget}"]
    _run_flow("plan", recipe, [*(overrides or []), *limit], home)


@app.command()
def repair(recipe: RecipeArgument, overrides: Overrides = None, home: Home = DEFAULT_HOME) -> None:
    """Make exactly the damaged shards of a recipe's store again."""
    _run_flow("repair", recipe, overrides or [], home)


app.command()(inspect)
app.command()(verify)
app.command()(gc)


@app.command(name="list")
def list_everything() -> None:
    """List the flows and the recipes."""
    from deployments.recipe import recipe_names  # noqa: PLC0415 (see above)

    table = Table("flow", "does", box=None, pad_edge=False)
    for entry in FLOWS:
        table.add_row(entry.name, entry.description)
    OUT.print(table)
    OUT.print(f"\nrecipes: {', '.join(recipe_names())}")
    OUT.print("run one: eyas run offline smollm2")


@app.command()
def render_deployments(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("prefect.yaml"),
) -> None:
    """Write prefect.yaml from the recipes."""
    from deployments import prefect_yaml  # noqa: PLC0415 (see above)
    from deployments.recipe import recipe_names  # noqa: PLC0415 (see above)

    with one_message():
        path.write_text(prefect_yaml.render(), encoding="utf-8")
        OUT.print(f"wrote {path}: {len(FLOWS)} flows for {len(recipe_names())} recipes")


def _run_flow(
    flow: str, recipe: str, overrides: list[str], home: str, *, run_name: str | None = None
) -> None:
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 (see above)

    from deployments.recipe import load_recipe  # noqa: PLC0415 (see above)
    from flows.workspace import require_run_name  # noqa: PLC0415 (see above)

    with one_message(stopped="stopped; the same command goes on with what is missing"):
        entry = find_flow(flow)
        loaded = load_recipe(recipe, overrides)
        settle_environment()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        from deployments.api import prefect_api, print_own_lines  # noqa: PLC0415 (Prefect reads its environment here)

        ERRORS.print(f"[bold]eyas[/bold] {entry.name}/{loaded.target.name}")
        parameters = {section: getattr(loaded, section) for section in entry.sections}
        if run_name is not None and "training" not in entry.sections:
            raise ConfigError(f"{entry.name} belongs to no run; leave out --run {run_name}")
        if run_name is not None:
            parameters["run"] = require_run_name(run_name)
        if not sys.stderr.isatty():  # no progress bars there
            print_own_lines()
        with prefect_api() as api_url:
            if api_url:
                ERRORS.print(f"reporting to {api_url.removesuffix('/api')}")
            entry.load()(**parameters, home=home)
