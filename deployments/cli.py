"""The `eyas` command: run a flow here and now, list what there is, write prefect.yaml."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

import eagle_core.errors
import storage.errors
from deployments import prefect_yaml
from deployments.environment import settle_environment
from deployments.recipe import load_recipe, recipe_names
from deployments.registry import FLOWS, find_flow
from flows.workspace import DEFAULT_HOME

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)
_console = Console()
_errors = Console(stderr=True)

EXPECTED_ERRORS = (eagle_core.errors.EagleCoreError, storage.errors.StorageError)


@contextmanager
def _one_message() -> Iterator[None]:
    """Turn an error raised on purpose into its one message and exit status 1."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        _errors.print(
            f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}", soft_wrap=True
        )
        raise typer.Exit(code=1) from None


@app.command()
def run(
    flow: Annotated[str, typer.Argument(help="Flow, such as offline or hidden-states.")],
    recipe: Annotated[str, typer.Argument(help="Recipe, such as smollm2, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, as often as you like."),
    ] = None,
    home: Annotated[str, typer.Option(help="Folder for data, stores and runs.")] = DEFAULT_HOME,
    run_name: Annotated[
        str | None, typer.Option("--run", help="Name of the training run; each has its own draft.")
    ] = None,
) -> None:
    """Run a flow in this process; no server or worker needed."""
    with _one_message():
        entry = find_flow(flow)
        loaded = load_recipe(recipe, overrides or [])
        settle_environment()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        from deployments.api import prefect_api, print_own_lines  # noqa: PLC0415 (Prefect reads its environment here)

        _errors.print(f"[bold]eyas[/bold] {entry.name}/{loaded.target.name}")
        parameters = {section: getattr(loaded, section) for section in entry.sections}
        if run_name is not None and "training" in entry.sections:
            parameters["run"] = run_name
        if not sys.stderr.isatty():  # no progress bars there
            print_own_lines()
        with prefect_api() as api_url:
            if api_url:
                _errors.print(f"reporting to {api_url.removesuffix('/api')}")
            entry.load()(**parameters, home=home)


@app.command(name="list")
def list_everything() -> None:
    """List the flows and the recipes."""
    table = Table("flow", "does", box=None, pad_edge=False)
    for entry in FLOWS:
        table.add_row(entry.name, entry.description)
    _console.print(table)
    _console.print(f"\nrecipes: {', '.join(recipe_names())}")
    _console.print("run one: eyas run offline smollm2")


@app.command()
def render_deployments(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("prefect.yaml"),
) -> None:
    """Write prefect.yaml from the recipes."""
    with _one_message():
        path.write_text(prefect_yaml.render(), encoding="utf-8")
        _console.print(f"wrote {path}: {len(FLOWS) * len(recipe_names())} deployments")
