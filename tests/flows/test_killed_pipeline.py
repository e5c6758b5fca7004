"""SIGKILL at any moment of states, publishing, training and collecting: the very end of one life.

`benchmarks/sigkills.py` does the same a thousand times over.
"""

import random
import time
from pathlib import Path

import pytest

from benchmarks.sigkills import State, settings_for
from tests import killed_pipeline, tiny

KILLS = 50

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


@pytest.mark.slow
def test_killed_anywhere_ends_as_undisturbed(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data", tiny.write_target(tmp_path / "target"))
    rng = random.Random(16)  # noqa: S311
    kills = 0
    with killed_pipeline.started(settings) as lives:
        lives.live(tmp_path / "first")
        began = time.monotonic()
        assert not lives.live(tmp_path / "undisturbed")
        whole_seconds = time.monotonic() - began
        expected = State.of(tmp_path / "undisturbed")
        while kills < KILLS:
            folder = tmp_path / f"killed-{kills}"
            state = State()
            while lives.live(folder, seconds=rng.uniform(0, 2 * whole_seconds / 5)):
                kills += 1
                state = State.of(folder, before=state)
                if kills >= KILLS:
                    assert not lives.live(folder)
                    break
            assert State.of(folder, before=state) == expected
    assert kills >= KILLS
