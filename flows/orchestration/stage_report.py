"""What a stage says at its end: a table in the terminal and an artifact in the Prefect UI."""

from collections.abc import Sequence

from prefect.context import FlowRunContext

from flows.orchestration.artifacts import publish_table
from flows.reports.table import Row, print_table


def report_stage(
    title: str, rows: Sequence[Row], *, key: str, following: Sequence[Row] = ()
) -> None:
    """Publish the figures of a flow, and print them.

    `following` are rows for the terminal alone: where to look, and the next command.
    """
    print_stage(title, [*rows, *following])
    publish_table(title, rows, key=key)


def print_stage(title: str, rows: Sequence[Row]) -> None:
    """Print a table, unless this flow is a stage of another, which prints one of all stages."""
    context = FlowRunContext.get()
    if not (context and context.flow_run and context.flow_run.parent_task_run_id):
        print_table(title, rows)
