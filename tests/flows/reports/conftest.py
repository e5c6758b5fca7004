"""Here plots are looked at."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def plots_drawn_once() -> None:
    """Draw them all."""
