"""A run is trained by one process at a time."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from flows.errors import RunBusyError
from flows.sole_training import sole_training

_HOLD = """
import sys
from pathlib import Path
from flows.sole_training import sole_training
with sole_training(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_of_a_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunBusyError, match=r"another process is training run .*run.*--run"),
            sole_training(tmp_path / "run"),
        ):
            pass
        with sole_training(tmp_path / "other"):
            pass
        first.kill()
    with sole_training(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("flows.sole_training.fcntl.flock", refuse)
    with sole_training(tmp_path / "run"):
        pass
    assert "cannot be locked" in caplog.text
