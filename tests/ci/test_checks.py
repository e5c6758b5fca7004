"""What CI does with a test that fails, and what a run says of the tests that it could not run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.closing import not_run
from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS

pytestmark = pytest.mark.slow

CONFTEST = """
from tests.closing import pytest_configure, pytest_sessionfinish, pytest_terminal_summary
"""
MAKEFILE = f"""
lint docs test-newest test-engine own-network test-hosts demo: ; @echo $@ ran
test: ; @{sys.executable} -m pytest -q -p no:xdist
"""
PASSES = "def test_sound(): pass\n"
FLAKY = """
from pathlib import Path

def test_only_again():
    been = Path("been-here")
    if not been.exists():
        been.touch()
        raise AssertionError
"""
FAILS = "def test_broken(): assert 1 == 2\n"
DIES = "import os\ndef test_last_words(): os._exit(9)\n"
LACKS = """
from tests import needs
LACKED = needs.Program(name="Nowhere", command="there-is-no-such", install="pray")
needs.PROGRAMS = (LACKED,)

@LACKED.mark()
def test_left_out(): pass
"""


def run(folder: Path, *arguments: str, tests: str) -> subprocess.CompletedProcess[str]:
    """Run a command where these are the tests."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(tests)
    hidden = ("PYTEST_", "CI")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(
        arguments,
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "CI": "true", "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )


def checks(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Run CI's checks on a project that is nothing but these tests."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "checks", folder / ".ci")
    (folder / "Makefile").write_text(MAKEFILE)
    return run(folder, ".ci/checks", tests=tests)


def test_what_passes_the_second_time_is_named_and_does_not_fail(tmp_path: Path) -> None:
    ended = checks(tmp_path, PASSES + FLAKY)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.splitlines()[-2] == "FLAKY test_it.py::test_only_again"
    assert ended.stdout.splitlines()[-1].startswith("CI passed in ")
    assert "demo ran" in ended.stdout


def test_what_fails_twice_fails_and_is_the_last_thing_that_is_said(tmp_path: Path) -> None:
    ended = checks(tmp_path, PASSES + FLAKY + FAILS)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-2:] == [
        "CI failed at: tests",
        "  failed twice: test_it.py::test_broken",
    ]
    assert "FLAKY test_it.py::test_only_again" in ended.stdout
    assert "demo ran" not in ended.stdout


def test_a_run_that_did_not_come_to_its_end_is_no_hiccup(tmp_path: Path) -> None:
    ended = checks(tmp_path, PASSES + DIES)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1] == "CI failed at: tests"
    assert "runs once more" not in ended.stdout


def test_in_ci_no_test_is_left_out_for_a_program_that_can_be_installed(tmp_path: Path) -> None:
    ended = run(tmp_path, sys.executable, "-m", "pytest", "-q", tests=PASSES + LACKS)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 test: needs Nowhere; install it: pray\n    test_it.py (1)" in ended.stdout


def test_elsewhere_it_is_left_out_and_named(tmp_path: Path) -> None:
    command = ("env", "CI=", sys.executable, "-m", "pytest", "-q")
    ended = run(tmp_path, *command, tests=PASSES + LACKS)
    assert ended.returncode == 0
    assert "1 test: needs Nowhere; install it: pray\n    test_it.py (1)" in ended.stdout


def test_tests_that_did_not_run_are_counted_by_reason() -> None:
    skipped = [("a.py::one", "needs x"), ("b.py::two", "needs x"), ("b.py::three", "needs x")]
    assert list(not_run([*skipped, ("c.py", "needs y")])) == [
        "3 tests: needs x",
        "    a.py (1)",
        "    b.py (2)",
        "1 test: needs y",
        "    c.py (1)",
    ]


def test_every_program_says_how_to_install_it() -> None:
    for program in needs.PROGRAMS:
        assert program.reason.startswith(needs.PREFIX)
        assert program.install in program.reason
