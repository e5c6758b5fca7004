"""A run is trained by one process at a time."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from flows.bridge import run_lock
from flows.bridge.run_lock import LOCK_NAME, sole_training
from flows.errors import RunBusyError
from tests.paths import ROOT
from tests.waiting import wait_for

_HOLD = """
import sys
from pathlib import Path
from flows.bridge.run_lock import sole_training
with sole_training(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _hold(run_path: Path) -> subprocess.Popen[bytes]:
    held = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(run_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    return held


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


def test_a_second_training_of_a_run_is_refused_until_the_first_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with _hold(tmp_path / "run") as first:
        with (
            pytest.raises(
                RunBusyError,
                match=rf"training run .*run \(process {first.pid} of .* on .*, since 2.*--run",
            ),
            sole_training(tmp_path / "run"),
        ):
            pass
        with sole_training(tmp_path / "other"):
            pass
        assert not caplog.records
        first.kill()
    with sole_training(tmp_path / "run"):
        pass
    assert f"run is taken over from process {first.pid} of" in caplog.text
    assert (tmp_path / "run" / LOCK_NAME).read_bytes().strip() == b""


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock of the other host is seen here, and its signs of life come quickly."""
    monkeypatch.setattr("flows.bridge.run_lock.fcntl.flock", _refuse)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 2.0)


@pytest.mark.usefixtures("two_hosts")
def test_an_owner_on_another_host_is_known_by_its_signs_of_life(tmp_path: Path) -> None:
    with (
        sole_training(tmp_path / "run") as first,
        pytest.raises(RunBusyError, match="another process is training run"),
        sole_training(tmp_path / "run"),
    ):
        pass
    first.require()


@pytest.mark.usefixtures("two_hosts")
def test_an_owner_on_another_host_that_is_dead_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that only slept finds out, and does not write into the run again."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 4.0)
    with sole_training(tmp_path / "run") as asleep:
        monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
        with sole_training(tmp_path / "run") as awake:
            wait_for(lambda: asleep._taken_by is not None, what="the sleeper to look")
            with pytest.raises(RunBusyError, match="no heartbeat for"):
                asleep.require()
            awake.require()
    assert "waiting 2 s for a heartbeat" in caplog.text
    assert "cannot be locked" in caplog.text


def test_a_lock_file_of_a_version_before_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).touch()
    with sole_training(tmp_path / "run") as lock:
        lock.require()
