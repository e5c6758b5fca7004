"""What every command prints to, and how an error becomes one message."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

import eagle_core.errors
import flows.errors
import storage.errors

OUT = Console()
ERRORS = Console(stderr=True)

EXPECTED_ERRORS = (
    eagle_core.errors.EagleCoreError,
    storage.errors.StorageError,
    flows.errors.FlowError,
)


@contextmanager
def one_message() -> Iterator[None]:
    """Turn an error raised on purpose into its one message and exit status 1."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        ERRORS.print(
            f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}", soft_wrap=True
        )
        raise typer.Exit(code=1) from None
