"""Run flows in this process, check and clean up stores, list recipes, write prefect.yaml."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from deployments import prefect_yaml
from deployments.cli.console import ERRORS, OUT, one_message
from deployments.cli.engine_commands import engines
from deployments.cli.environment import settle_environment
from deployments.cli.preset_commands import presets
from deployments.cli.run_argument import (
    Home,
    Overrides,
    RunArgument,
    RunNameOption,
    parameters_of,
)
from deployments.cli.serve_command import serve
from deployments.cli.store_commands import gc, inspect, verify
from deployments.recipe import load_recipe, recipe_names, recipe_text
from deployments.registry import FLOWS, IMPORT_STORE, FlowEntry, find_flow
from eagle_core.atomic_files import write_text
from eagle_core.errors import ConfigError
from flows.workspace import DEFAULT_HOME

if TYPE_CHECKING:
    from flows.summaries import ImportSummary

# `--help` answers at once: what takes long to import is imported by the commands that need it.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe such as smollm2, or a YAML file, or the folder of a run.")
]


IMPORT_CHOICES = {
    "format": ("specforge", "speculators", "model-optimizer", "nemo"),
    "mask": ("dump", "template", "all"),
    "last_state": ("auto", "normed", "unnormed"),
}


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
    run: RunArgument,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    run_name: RunNameOption = None,
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
def bench(
    run: RunArgument,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    run_name: RunNameOption = None,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm or llamacpp; by default bench.engine, which is auto."),
    ] = None,
) -> None:
    """Find out how to serve a draft on this machine, and from which acceptance on it pays.

    Decodes the same prompts on an engine without the draft and with every setting of the section
    `bench`. Use a machine that does nothing else.
    """
    chosen = [] if engine is None else [f"bench.engine={engine}"]
    own = {} if run_name is None else {"run": run_name}
    _run_flow("bench", run, [*(overrides or []), *chosen], home, own)


@app.command()
def repair(recipe: RecipeArgument, overrides: Overrides = None, home: Home = DEFAULT_HOME) -> None:
    """Recompute exactly the damaged shards of a recipe's store."""
    _run_flow("repair", recipe, overrides or [], home)


@app.command()
def import_store(  # noqa: PLR0917 (one parameter per option)
    format: Annotated[  # noqa: A002 (as users type it)
        str,
        typer.Argument(help="specforge, speculators, model-optimizer or nemo."),
    ],
    path: Annotated[Path, typer.Argument(help="Folder or file that the other tool wrote.")],
    recipe: Annotated[
        str, typer.Argument(help="Recipe of the target: a name such as smollm2, or a YAML file.")
    ],
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the new data set; by default `dataset.name` of --set, or the format."
        ),
    ] = None,
    mask: Annotated[
        str,
        typer.Option(
            help="Where loss masks come from: `dump`, `template` (the target's chat template) or "
            "`all` (every token)."
        ),
    ] = "dump",
    last_state: Annotated[
        str,
        typer.Option(
            help="Whether last states are those after the final norm: `normed`, `unnormed`, or "
            "`auto`, which is what the format says."
        ),
    ] = "auto",
    check: Annotated[
        int,
        typer.Option(
            min=0, help="Rows to compare with the target's own states; 0 does not run the target."
        ),
    ] = 4,
    check_every_row: Annotated[
        bool,
        typer.Option(
            "--check-every-row",
            help="Run the target's first and last layers on every row: its states must agree with "
            "each other and with its tokens.",
        ),
    ] = False,
) -> None:
    """Import hidden states that SpecForge, speculators, Model-Optimizer or NeMo dumped.

    Nothing in their files is executed. Rows that are damaged or do not fit the target are listed in
    a ledger, and the others are imported. An import that was interrupted continues. At the end
    there is a recipe to train with.
    """
    own: dict[str, str | bool | int] = {
        "format": format,
        "path": str(path),
        "mask": mask,
        "last_state": last_state,
        "num_checked": check,
        "check_every_row": check_every_row,
    }
    is_named = any(given.startswith("dataset.name=") for given in overrides or [])
    named = [] if is_named and name is None else [f"dataset.name={name or format}"]
    with one_message():
        _require_choices(own)
    summary = _run_flow(IMPORT_STORE, recipe, [*(overrides or []), *named], home, own)
    with one_message():
        written = _write_imported_recipe(recipe, overrides or [], summary)
        OUT.print(f"next: eyas run train {written} --home {home}", soft_wrap=True)


app.command()(serve)
app.command()(inspect)
app.command()(verify)
app.command()(gc)
app.command()(presets)
app.add_typer(engines, name="engines")


@app.command(name="list")
def list_everything() -> None:
    """List the flows and the recipes."""
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
    with one_message():
        path.write_text(prefect_yaml.render(), encoding="utf-8")
        OUT.print(f"wrote {path}: {len(FLOWS)} flows for {len(recipe_names())} recipes")


def _require_choices(own: Mapping[str, str | bool | int]) -> None:
    """Raise ConfigError unless the import's choices are known ones."""
    for key, choices in IMPORT_CHOICES.items():
        if own[key] not in choices:
            known = ", ".join(choices)
            raise ConfigError(f"there is no {key.replace('_', '-')} {own[key]!r}; known: {known}")


def _write_imported_recipe(recipe: str, overrides: list[str], summary: "ImportSummary") -> Path:
    """Write the recipe that trains on imported states; return its path."""
    imported = load_recipe(recipe, overrides).model_copy(update={"dataset": summary.dataset})
    path = summary.ledger_path.with_name("recipe.yaml")
    write_text(path, recipe_text(imported))
    return path


def _run_flow(
    flow: str | FlowEntry,
    recipe: str,
    overrides: list[str],
    home: str,
    own: Mapping[str, str | bool | int] | None = None,
) -> Any:  # noqa: ANN401 (of any flow)
    """Run a flow and return its result; `own` holds parameters that are no sections of a recipe."""
    with one_message(stopped="stopped; the same command resumes with what is missing"):
        entry = find_flow(flow) if isinstance(flow, str) else flow
        parameters = parameters_of(entry, recipe, overrides, home, own or {})
        settle_environment()
        from transformers.utils import logging  # noqa: PLC0415 (see above)

        from deployments.api import (  # noqa: PLC0415 (Prefect reads its environment here)
            prefect_api,
            print_own_lines,
            print_own_warnings,
        )

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        subject = parameters["target"] if "target" in parameters else parameters["dataset"]
        ERRORS.print(f"[bold]eyas[/bold] {entry.name}/{subject.name}")
        print_own_warnings()
        if not sys.stderr.isatty():  # no progress bars are shown
            print_own_lines()
        with prefect_api() as api_url:
            if api_url:
                ERRORS.print(f"reporting to {api_url.removesuffix('/api')}")
            return entry.load()(**parameters)
