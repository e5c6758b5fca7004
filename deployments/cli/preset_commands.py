"""`eyas presets`: the named data sets, and whether the hub still has them."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.cli.console import ERRORS, OUT, one_message
from eagle_core.data.presets import PRESETS
from eagle_core.errors import ConfigError

# The hub's client is imported by the commands that need it.


def presets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PRESET]...", help="By default, all presets.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Read the first records of each from its newest commit; exit 1 if one cannot be "
            "read. Nothing is stored, but a source that is one JSON array is downloaded whole.",
        ),
    ] = False,
) -> None:
    """List the named data sets for `dataset.source`."""
    with one_message():
        chosen = names or sorted(PRESETS)
        for name in chosen:
            if name not in PRESETS:
                raise ConfigError(
                    f"there is no data set preset {name}; use one of {', '.join(sorted(PRESETS))}"
                )
        if check:
            _check(chosen)
        else:
            _list(chosen)


def _list(names: list[str]) -> None:
    from eagle_core.data.preset_checks import preset_config  # noqa: PLC0415 (see above)

    table = Table("preset", "source", "split", "subsets", "columns", box=None, pad_edge=False)
    for name in names:
        config = preset_config(name)
        on_hub = config.source.startswith("hf:")
        columns = f"{', '.join(config.question)} -> {', '.join(config.answer)}"
        table.add_row(
            *(escape(config.name), escape(config.source), config.split if on_hub else ""),
            *(", ".join(config.subsets), columns if config.question else "recognised"),
        )
    _print(table)
    OUT.print("use one: --set dataset.source=preset:NAME; ask the hub for each: --check")


def _check(names: list[str]) -> None:
    """Print a row for each preset; exit with 1 unless all can be read."""
    from eagle_core.data.preset_checks import check_preset  # noqa: PLC0415 (see above)

    table = Table("preset", "found", "commit", "columns or fault", box=None, pad_edge=False)
    num_faults = 0
    for name in names:
        with ERRORS.status(f"asking for {name}"):
            found = check_preset(name)
        num_faults += found.fault is not None
        verdict = f"{found.verdict}, gated" if found.is_gated else found.verdict
        said = str(found.fault) if found.fault else ", ".join(found.columns)
        table.add_row(escape(name), verdict, found.commit[:8], escape(said))
    _print(table)
    if num_faults:
        OUT.print(f"{num_faults} of {len(names)} presets cannot be read")
        raise typer.Exit(code=1)


def _print(table: Table) -> None:
    """Print a table; outside a terminal, wide enough for what is in it."""
    (OUT if OUT.is_terminal else Console(width=400)).print(table)
