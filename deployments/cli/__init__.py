"""The command line; an installed `eyas` calls `app`."""

from typing import Any


def __getattr__(name: str) -> Any:  # noqa: ANN401 (of a module)
    """Return `app` when it is asked for: a temporary server starts without the commands."""
    if name == "app":
        from deployments.cli.commands import app  # noqa: PLC0415 (see above)

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
