"""The consoles of all commands, and how an error becomes one message."""

import signal
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

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM; shells use it for Ctrl-C."""
EXPECTED_ERRORS = (
    eagle_core.errors.EagleCoreError,
    storage.errors.StorageError,
    flows.errors.FlowError,
)


@contextmanager
def one_message(*, stopped: str = "stopped") -> Iterator[None]:
    """Turn an error raised on purpose, or a request to stop, into one message.

    SIGTERM is handled like Ctrl-C: child processes end too. Training has its own handler.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except EXPECTED_ERRORS as error:
        ERRORS.print(
            f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}", soft_wrap=True
        )
        raise typer.Exit(code=1) from None
    except OSError as error:
        if error.errno is None or error.filename is None:  # not about a file
            raise
        what = escape(f"{error.strerror}: {error.filename}")
        ERRORS.print(f"[bold red]{type(error).__name__}[/bold red]: {what}", soft_wrap=True)
        raise typer.Exit(code=1) from None
    except KeyboardInterrupt:
        ERRORS.print(stopped)
        raise typer.Exit(code=INTERRUPTED) from None
