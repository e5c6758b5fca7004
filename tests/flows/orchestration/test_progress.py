"""Progress is shown, and work never waits for it."""

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact

from flows.orchestration import progress
from flows.orchestration.artifacts import publish_table
from flows.orchestration.progress import moving, stage_progress


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the artifact was moved to."""
    seen: list[float] = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda **_about: uuid4())
    monkeypatch.setattr(progress, "moving", lambda _artifact: nullcontext(seen.append))
    return seen


def test_the_end_is_shown_though_the_stage_was_short(shown: list[float]) -> None:
    with stage_progress("shards", key="k", total=4, unit="shards") as stage:
        stage.advance(3)
    assert shown == [75.0]


def test_work_goes_on_while_the_server_is_away(
    shown: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, back = threading.Event(), threading.Event()

    def hang(percent: float) -> None:
        asked.set()
        back.wait()
        shown.append(percent)

    monkeypatch.setattr(progress, "moving", lambda _artifact: nullcontext(hang))
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LAST_UPDATE_SECONDS", 0.01)
    with stage_progress("training", key="k", total=10, unit="steps") as stage:
        stage.advance()
        assert asked.wait(60)
        (follower,) = (one for one in threading.enumerate() if one.name == "progress of training")
        for _ in range(9):
            stage.advance()
    assert (stage.done, shown) == (10, [])
    back.set()
    follower.join(60)
    assert shown == [10.0, 100.0], "a server that is back is told how it ended"


def test_an_update_that_fails_costs_a_picture(
    shown: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(percent: float) -> None:
        shown.append(percent)
        raise ConnectionError

    monkeypatch.setattr(progress, "moving", lambda _artifact: nullcontext(fail))
    with stage_progress("training", key="k", total=2, unit="steps") as stage:
        stage.advance(2)
    assert shown == [100.0]


def test_a_server_that_is_away_from_the_start_costs_a_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_about: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(progress, "create_progress_artifact", refuse)
    monkeypatch.setattr(
        "flows.orchestration.artifacts.create_markdown_artifact", lambda *_text, **_about: refuse()
    )
    with stage_progress("training", key="k", total=2, unit="steps") as stage:
        stage.advance(2)
    publish_table("Training", [("steps", "2")], key="k")
    assert stage.done == 2
    assert "progress of training is skipped: ConnectionError: no server" in caplog.text
    assert "the artifact 'Training' is skipped: ConnectionError: no server" in caplog.text


@pytest.mark.server
@pytest.mark.usefixtures("prefect_server")
def test_an_update_under_way_when_the_flow_ends_still_arrives() -> None:
    def artifact() -> Artifact:
        with get_client(sync_client=True) as client:
            key = ArtifactFilter(key=ArtifactFilterKey(any_=["outliving"]))
            (found,) = client.read_artifacts(artifact_filter=key)
        return found

    with ExitStack() as outlives:

        @flow
        def work() -> Callable[[float], object]:
            with stage_progress("shards", key="outliving", total=4, unit="shards") as stage:
                stage.advance(3)
            assert artifact().data == 75.0
            return outlives.enter_context(moving(artifact().id))

        move = work()
        move(80.0)
        assert artifact().data == 80.0
