"""Retry clicked in the real Prefect UI, in a real browser: only what is missing is made again."""

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from storage.store import Store
from tests.browser import CHROMIUM, browser_page
from tests.deployments.server import AUTH, Server, running_server, wait_for
from tests.flows.trees import digests

pytestmark = [pytest.mark.server, pytest.mark.ui, pytest.mark.slow]

if CHROMIUM is None:
    pytest.skip("needs Debian's chromium", allow_module_level=True)

STORE = '{"shard_tokens": 660, "shards_per_task": 1}'
WORKER_SECONDS = 20
"""A worker learns of a death some ten seconds after the run's own supervisor has reported it, and
says so again if the run is not over: a run that is retried before that crashes (Prefect 3.8.8)."""
TERMINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_target_path: Path) -> Iterator[Server]:
    """A server and a worker with one deployment."""
    with running_server(tmp_path_factory.mktemp("ui"), tiny_target_path) as started:
        ended = started.prefect("deploy", "--name", "hidden-states/tiny")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        yield started


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> Store:
    """Twenty shards, or so, that nothing happened to."""
    run = _start(server, "undisturbed")
    assert _ended(server, run)["state_name"] == "Completed"
    store = _store(server, "undisturbed")
    assert 15 <= len(store.commits()) <= 25
    return store


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """A page of a browser in which a person has logged in."""
    with browser_page(width=1400, height=900) as opened:
        opened.set_default_timeout(60_000)
        opened.goto(f"{server.api_url.removesuffix('/api')}/v2/login")
        opened.locator("input").first.fill(AUTH)
        opened.get_by_role("button", name="Login").click()
        opened.get_by_role("link", name="Deployments").wait_for()
        yield opened


def test_retry_makes_the_two_shards_that_failed(
    server: Server, undisturbed: Store, page: Page
) -> None:
    """Two shards cannot be written, and the process that makes shards is killed in a third."""
    root = _root(server, "obstructed")
    names = sorted(undisturbed.commits())
    obstacles = [root / "shards" / name for name in (names[3], names[11])]
    (root / "shards").mkdir(parents=True)
    for obstacle in obstacles:
        obstacle.write_text("a file where the shard's folder belongs")
    run = _start(server, "obstructed")
    wait_for(lambda: _num_commits(root) >= 4, seconds=120, what="the first shards")
    os.kill(_shard_process(server), signal.SIGKILL)

    assert _ended(server, run)["state_name"] == "Failed"
    assert _num_commits(root) == len(names) - len(obstacles)
    first = _shard_tasks(server, run)
    assert len(first) == len(names)
    assert sum(task["state_type"] == "FAILED" for task in first) == len(obstacles)
    assert max(task["run_count"] for task in first) == 2, "the killed batch was tried again"
    for obstacle in obstacles:
        obstacle.unlink()
    before = _commit_times(root)
    _choose(page, server, run, "Retry")

    wait_for(lambda: _run(server, run)["run_count"] == 2, seconds=120, what="the second attempt")
    assert _ended(server, run)["state_name"] == "Completed"
    assert _run(server, run)["name"] == "hidden-states-tiny-facts-attempt-2"
    assert len(_shard_tasks(server, run)) == len(names) + len(obstacles)
    after = _commit_times(root)
    assert before.items() <= after.items(), "nothing that was there was written again"
    assert digests(root) == digests(Path(undisturbed.root.root))
    page.goto(f"{_address(server, run)}?tab=Artifacts")
    page.get_by_text("Shards of tiny made by this run: 2", exact=True).wait_for()


def test_a_killed_run_goes_on_by_retry(server: Server, undisturbed: Store, page: Page) -> None:
    root = _root(server, "killed")
    run = _start(server, "killed")
    wait_for(lambda: _num_commits(root) >= 3, seconds=120, what="the first shards")
    status = (Path("/proc") / str(_shard_process(server)) / "status").read_text()
    flow_process = int(re.findall(r"PPid:\s*(\d+)", status)[0])
    os.kill(flow_process, signal.SIGKILL)
    assert _ended(server, run)["state_name"] == "Crashed"
    time.sleep(WORKER_SECONDS)
    _goes_on(server, run, root, undisturbed, page)


def test_a_run_that_a_person_cancelled_goes_on_by_retry(
    server: Server, undisturbed: Store, page: Page
) -> None:
    root = _root(server, "cancelled")
    run = _start(server, "cancelled")
    wait_for(lambda: _num_commits(root) >= 3, seconds=120, what="the first shards")
    worker = _shard_process(server)
    os.kill(worker, signal.SIGSTOP)  # it hangs, and the run would never end
    _choose(page, server, run, "Cancel")
    assert _ended(server, run)["state_name"] == "Cancelled"
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    _goes_on(server, run, root, undisturbed, page)


def test_a_run_outlives_a_restart_of_the_server(server: Server, undisturbed: Store) -> None:
    root = _root(server, "restarted")
    run = _start(server, "restarted")
    wait_for(lambda: _num_commits(root) >= 3, seconds=120, what="the first shards")
    worker = _shard_process(server)
    os.kill(worker, signal.SIGSTOP)
    assert _num_commits(root) < len(undisturbed.commits())
    server.restart()
    os.kill(worker, signal.SIGCONT)
    ended = _ended(server, run)
    assert (ended["state_name"], ended["run_count"]) == ("Completed", 1)
    assert digests(root) == digests(Path(undisturbed.root.root))


def _goes_on(server: Server, run: str, root: Path, undisturbed: Store, page: Page) -> None:
    """Click Retry; see that only missing shards are made, and that no bit differs."""
    before = _commit_times(root)
    wanted = len(undisturbed.commits())
    assert 3 <= len(before) < wanted, "it was stopped in the middle"
    tasks = len(_shard_tasks(server, run))
    _choose(page, server, run, "Retry")
    wait_for(lambda: _run(server, run)["run_count"] == 2, seconds=120, what="the second attempt")
    assert _ended(server, run)["state_name"] == "Completed"
    assert before.items() <= _commit_times(root).items()
    assert len(_shard_tasks(server, run)) - tasks == wanted - len(before)
    assert digests(root) == digests(Path(undisturbed.root.root))


def _choose(page: Page, server: Server, run: str, action: str) -> None:
    """Choose an entry of a run's menu, and say yes."""
    page.goto(_address(server, run))
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name=action).click()
    yes = (
        page.get_by_role("alertdialog")
        .or_(page.get_by_role("dialog"))
        .get_by_role("button", name=re.compile(f"^{action}"))
        .last  # the one before it dismisses the question whether to cancel
    )
    with page.expect_response(lambda answer: answer.url.endswith("/set_state")):
        yes.click()
    page.goto("about:blank")  # drawing a page that moves takes half of a core


def _address(server: Server, run: str) -> str:
    return f"{server.api_url.removesuffix('/api')}/v2/runs/flow-run/{run}"


def _start(server: Server, home: str) -> str:
    """Run the deployment with a home of its own; return the run's id."""
    ended = server.prefect(
        *("deployment", "run", "hidden-states/tiny"),
        *("--param", f"store={STORE}", "--param", f'home="{home}"'),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = re.search(r"UUID: ([0-9a-f-]{36})", ended.stdout)
    assert found is not None, ended.stdout
    return found[1]


def _run(server: Server, run: str) -> dict[str, Any]:
    (found,) = server.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return found  # type: ignore[no-any-return]


def _ended(server: Server, run: str) -> dict[str, Any]:
    wait_for(
        lambda: _run(server, run)["state_type"] in TERMINAL, seconds=180, what="the end of the run"
    )
    return _run(server, run)


def _shard_tasks(server: Server, run: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.post(
        "task_runs/filter",
        {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"name": {"like_": "shards "}}},
    )
    return found


def _root(server: Server, home: str) -> Path:
    return server.project / home / "stores" / "tiny-facts"


def _store(server: Server, home: str) -> Store:
    return Store.open(str(_root(server, home)))


def _commit_times(root: Path) -> Mapping[str, int]:
    """Return when each commit record was written."""
    return {path.name: path.stat().st_mtime_ns for path in root.glob("commits/*.json")}


def _num_commits(root: Path) -> int:
    return len(_commit_times(root))


def _shard_process(server: Server) -> int:
    """Return the id of the process that makes shards."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                command = (entry / "cmdline").read_bytes()
                if (
                    b"flows.shard_worker" in command
                    and (entry / "cwd").readlink() == server.project
                ):
                    found.append(int(entry.name))
    (process,) = found
    return process
