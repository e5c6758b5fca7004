"""Names of flow runs: the subject and, from the second attempt on, the number of the attempt."""

from collections.abc import Callable

from prefect.context import FlowRunContext


def run_name(form: str) -> Callable[[], str]:
    """Return a function that names a run from `form`, such as "train-{target.name}-{run}"."""

    def name() -> str:
        context = FlowRunContext.get()
        assert context is not None  # noqa: S101 (Prefect calls it within one)
        assert context.flow_run is not None  # noqa: S101
        stem = form.format(**(context.parameters or {}))
        attempts_before = context.flow_run.run_count
        return f"{stem}-attempt-{attempts_before + 1}" if attempts_before else stem

    return name
