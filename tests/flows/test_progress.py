"""Progress is shown, and work never waits for it."""

import threading
from uuid import uuid4

import pytest

from flows import progress
from flows.progress import stage_progress


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the artifact was moved to."""
    seen: list[float] = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda **_about: uuid4())
    monkeypatch.setattr(
        progress, "update_progress_artifact", lambda _artifact, progress: seen.append(progress)
    )
    return seen


def test_the_end_is_shown_though_the_stage_was_short(shown: list[float]) -> None:
    with stage_progress("shards", key="k", total=4, unit="shards") as stage:
        stage.advance(3)
    assert shown == [75.0]


def test_work_goes_on_while_the_server_is_away(
    shown: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, back = threading.Event(), threading.Event()

    def hang(_artifact: object, progress: float) -> None:
        asked.set()
        back.wait()
        shown.append(progress)

    monkeypatch.setattr(progress, "update_progress_artifact", hang)
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LAST_UPDATE_SECONDS", 0.01)
    with stage_progress("training", key="k", total=10, unit="steps") as stage:
        stage.advance()
        assert asked.wait(60)
        for _ in range(9):
            stage.advance()
    assert (stage.done, shown) == (10, [])
    back.set()


def test_an_update_that_fails_costs_a_picture(
    shown: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_artifact: object, progress: float) -> None:
        shown.append(progress)
        raise ConnectionError

    monkeypatch.setattr(progress, "update_progress_artifact", fail)
    with stage_progress("training", key="k", total=2, unit="steps") as stage:
        stage.advance(2)
    assert shown == [100.0]
