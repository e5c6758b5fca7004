"""A table of names and values, printed in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = tuple[str, str]


def print_table(title: str, rows: Sequence[Row], *, is_ruled: bool = False) -> None:
    """Print `rows` on standard output, with lines between them if it `is_ruled`."""
    table = Table(
        title=escape(title),
        title_justify="left",
        show_header=False,
        show_lines=is_ruled,
        min_width=60,
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    # Paths in a log must stay copyable: outside a terminal nothing is folded.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
