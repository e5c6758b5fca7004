"""Artifacts of the current run, as the Prefect UI shows them."""

import base64
from collections.abc import Sequence

from prefect.artifacts import create_image_artifact, create_markdown_artifact

from flows.orchestration.best_effort import best_effort
from flows.reports.table import Row


def publish_table(title: str, rows: Sequence[Row], *, key: str) -> None:
    """Write `rows` as a Markdown artifact of the current run; `key` groups its history."""
    lines = [f"## {title}", "", "| | |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    publish_markdown(title, "\n".join(lines), key=key)


def publish_markdown(title: str, text: str, *, key: str) -> None:
    """Show `text` as a Markdown artifact of the current run."""
    with best_effort(f"the artifact {title!r}"):
        create_markdown_artifact(text, key=key, description=title)


def publish_plot(title: str, svg: str, *, key: str) -> None:
    """Show a plot as an image artifact of the current run."""
    encoded = base64.b64encode(svg.encode()).decode()
    with best_effort(f"the artifact {title!r}"):
        create_image_artifact(f"data:image/svg+xml;base64,{encoded}", key=key, description=title)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
