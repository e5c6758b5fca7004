"""`python -m deployments` is `eyas`."""

from deployments.cli.app import app

if __name__ == "__main__":
    app()
