"""The command line; an installed `eyas` calls `app`."""

from deployments.cli.commands import app

__all__ = ["app"]
