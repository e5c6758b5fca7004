"""`python -m deployments` is `eyas`."""

from deployments.cli import app

if __name__ == "__main__":
    app()
