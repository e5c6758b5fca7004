"""Hosted trackers, with the real packages in an environment of their own; offline throughout."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eagle_core.errors import ConfigError
from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.hosted import hosted_run_id
from eagle_core.tracking.trackers import open_trackers
from eagle_core.tracking.wandb import open_tracker
from tests.paths import ROOT
from tests.side_environment import side_environment
from tests.waiting import LIMIT_SECONDS

PROBE = Path(__file__).with_name("hosted_trackers_probe.py")


@pytest.fixture(scope="module")
def trackers_python() -> Path:
    """Interpreter of an environment with the three packages beside this one's."""
    return side_environment("trackers", ["wandb", "swanlab", "mlflow-skinny"])


def probe(python: Path, action: str, trackers: str, folder: Path) -> dict[str, Any]:
    """Run one action of the probe in a process of its own and return its answer."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    hidden = ("WANDB_", "SWANLAB_", "MLFLOW_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [python, PROBE, action, trackers, folder],
        env={**kept, "PYTHONPATH": str(ROOT), "HOME": str(home)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def merged(answer: list[Any]) -> dict[int, dict[str, float]]:
    """Return every step of a run that may lie in several files."""
    return {int(step): values for part in answer for step, values in part[2].items()}


@pytest.fixture(scope="module")
def resumed(
    trackers_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, dict[str, Any]]:
    """What three processes told: two that track a run one after the other, and one that reads."""
    folder = tmp_path_factory.mktemp("resumed")
    return {
        action: probe(trackers_python, action, "wandb,swanlab,mlflow", folder)
        for action in ("first", "second", "read")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("tracker", "num_parts"), [("wandb", 2), ("swanlab", 2), ("mlflow", 1)])
def test_a_resumed_run_goes_on_in_the_same_hosted_run_without_a_network(
    resumed: Mapping[str, dict[str, Any]], tracker: str, num_parts: int
) -> None:
    for action in ("first", "second"):
        told = resumed[action]
        assert told["connections"] == told["warnings"] == []
    found = resumed["read"]["answer"][tracker]
    assert [part[:2] for part in found] == [[told["id"], "drafts"]] * num_parts
    expected = {
        step: {
            "loss": pytest.approx(1 / step),
            "held_out/prefix_0": pytest.approx(step * 0.1),
            "tokens_per_second": 100.0 * step,
        }
        for step in (1, 2, 3, 4, 5)
    }
    assert merged(found) == expected
    settings = json.dumps(found[0][3])
    assert "learning_rate" in settings
    assert "0.001" in settings
    if tracker == "mlflow":
        assert found[0][3]["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_breaks_is_given_up_with_one_warning(
    trackers_python: Path, tmp_path: Path, tracker: str
) -> None:
    told = probe(trackers_python, "break", tracker, tmp_path)
    assert len(told["warnings"]) == 1
    assert told["warnings"][0].startswith(f"tracker {tracker} failed (")
    assert told["warnings"][0].endswith("training continues without it")


def test_what_is_decoded_late_is_not_below_the_steps_that_wandb_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    hosted = SimpleNamespace(
        step=101,  # it was resumed, with 0 to 100 logged
        define_metric=lambda *_names, **_axis: None,
        log=lambda scalars, step: sent.append((step, scalars)),
        finish=lambda **_how: None,
    )
    package = ModuleType("wandb")
    vars(package).update(Error=RuntimeError, Settings=dict, init=lambda **_settings: hosted)
    monkeypatch.setitem(sys.modules, "wandb", package)
    config = TrackingConfig(trackers=("wandb",), mode="online")
    with open_tracker(config, TrackedRun(name="r", path=tmp_path, settings={})) as tracker:
        tracker.log({"decoding/acceptance_length": 1.5}, step=80)
        tracker.log({"loss": 2.0}, step=95)  # is repeated, and dropped
        tracker.log({"loss": 1.0}, step=105)
        tracker.log({"decoding/acceptance_length": 1.75}, step=90)
    assert sent == [
        (101, {"decoding/acceptance_length": 1.5, "decoding/step": 80}),
        (95, {"loss": 2.0}),
        (105, {"loss": 1.0}),
        (105, {"decoding/acceptance_length": 1.75, "decoding/step": 90}),
    ]


@pytest.mark.parametrize(
    ("tracker", "package"),
    [("wandb", "wandb"), ("swanlab", "swanlab"), ("mlflow", "mlflow-skinny")],
)
def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, package: str
) -> None:
    # Neither the package, where it is installed, nor the folder that a run left counts as it.
    (tmp_path / tracker).mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, tracker, raising=False)
    config = TrackingConfig(trackers=("tensorboard", tracker))  # type: ignore[arg-type]
    run = TrackedRun(name="r", path=tmp_path / "r", settings={})
    message = rf"tracker {tracker} needs .* run `pip install -c constraints\.txt {package}`"
    with pytest.raises(ConfigError, match=message), open_trackers(config, run):
        pass
    assert not (tmp_path / "r").exists()  # nothing was opened before that was known


def test_tensorboard_is_one_of_them_and_none_is_possible(tmp_path: Path) -> None:
    run = TrackedRun(name="r", path=tmp_path, settings={})
    with open_trackers(TrackingConfig(), run) as tracker:
        tracker.log({"loss": 0.5}, step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    with open_trackers(TrackingConfig(trackers=()), run) as nothing:
        nothing.log({"loss": 0.5}, step=4)
    with pytest.raises(ValidationError, match="tensorboard"):
        TrackingConfig(trackers=("visdom",))  # type: ignore[arg-type]


def test_ids_are_plain_short_and_differ_when_names_do() -> None:
    assert hosted_run_id("smollm2-sharegpt-main") == "smollm2-sharegpt-main"
    ids = {hosted_run_id(name) for name in ("a.b", "a-b", "a b", "x" * 80, "x" * 81)}
    assert len(ids) == 5
    for hosted in ids:
        assert len(hosted) <= 60
        assert set(hosted) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
