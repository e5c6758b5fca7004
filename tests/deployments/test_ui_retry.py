"""Cancel and Retry clicked in the real Prefect UI, in a real browser."""

import os
import re
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from storage.store import Store
from tests import needs
from tests.browser import browser_page
from tests.deployments.server import AUTH, Server, running_server
from tests.flows.trees import digests
from tests.waiting import wait_for

pytestmark = [pytest.mark.server, pytest.mark.ui, pytest.mark.slow, needs.CHROMIUM.mark()]

STORE = {"shard_tokens": 600, "shards_per_task": 1}
WORKER_KNOWS = "Check whether the flow run exceeded its memory allocation"
"""What a worker tells the server when it learns of a death, up to twenty seconds after the run's
supervisor has reported it. It reports it again: a run retried before crashes (Prefect 3.9.1)."""
TERMINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_target_path: Path) -> Iterator[Server]:
    """A server and a worker with one deployment."""
    with running_server(tmp_path_factory.mktemp("ui"), tiny_target_path) as started:
        ended = started.prefect("deploy", "--name", "hidden-states/tiny")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        yield started


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """A page of a browser in which a person has logged in."""
    with browser_page(width=1400, height=900) as opened:
        opened.set_default_timeout(60_000)
        opened.goto(f"{server.api_url.removesuffix('/api')}/v2/login")
        opened.locator("input").first.fill(AUTH)
        opened.get_by_role("button", name="Login").click()
        opened.get_by_role("link", name="Deployments").wait_for()
        opened.goto("about:blank")
        yield opened


def test_one_run_is_cancelled_killed_and_obstructed_and_goes_on_by_retry(
    server: Server, page: Page
) -> None:
    """Each attempt makes only what the ones before did not commit; no bit differs in the end."""
    whole = _outlives_a_restart_of_the_server(server)
    root = _root(server, "disturbed")
    run = _start(server, "disturbed")
    before = _cancel(page, server, run, root)

    _retry(page, server, run, attempt=2)
    before = _kill_the_flow(server, run, root, before)

    missing = sorted(whole.commits().keys() - before.keys())
    obstacles = [
        root / "shards" / name for name in missing if not (root / "shards" / name).exists()
    ][-2:]
    for obstacle in obstacles:
        obstacle.write_text("a file where the shard's folder belongs")
    _retry(page, server, run, attempt=3)
    _kill_the_shard_process(server, root, before)
    assert _ended(server, run)["state_name"] == "Failed"
    third = _shard_tasks(server, run, attempt=3, count=len(missing))
    assert sum(task["state_type"] == "FAILED" for task in third) == len(obstacles) == 2
    assert max(task["run_count"] for task in third) == 2, "the killed batch was tried again"
    before = _still_there(root, before)
    assert len(before) == len(whole.commits()) - len(obstacles)

    for obstacle in obstacles:
        obstacle.unlink()
    _retry(page, server, run, attempt=4)
    assert _ended(server, run)["state_name"] == "Completed"
    assert _run(server, run)["name"] == "hidden-states-tiny-facts-attempt-4"
    _shard_tasks(server, run, attempt=4, count=len(obstacles))
    _still_there(root, before)
    assert digests(root) == digests(Path(whole.root.root))
    page.goto(f"{_address(server, run)}?tab=Artifacts")
    page.get_by_text("Shards of tiny computed by this run: 2", exact=True).wait_for()


def _outlives_a_restart_of_the_server(server: Server) -> Store:
    """Return the store of a run in whose middle the server was away."""
    root = _root(server, "whole")
    run = _start(server, "whole")
    worker, before = _stop_in_the_middle(server, root, {})
    server.restart()
    os.kill(worker, signal.SIGCONT)
    ended = _ended(server, run)
    assert (ended["state_name"], ended["run_count"]) == ("Completed", 1)
    assert 15 <= len(_still_there(root, before)) <= 25
    assert len(before) < 10, "it was stopped in the middle"
    return Store.open(str(root))


def _cancel(page: Page, server: Server, run: str, root: Path) -> Mapping[str, int]:
    worker, before = _stop_in_the_middle(server, root, {})  # it hangs, and the run would never end
    _choose(page, server, run, "Cancel")
    assert _ended(server, run)["state_name"] == "Cancelled"
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    return _still_there(root, before)


def _kill_the_flow(
    server: Server, run: str, root: Path, before: Mapping[str, int]
) -> Mapping[str, int]:
    worker, _ = _stop_in_the_middle(server, root, before)
    known = _deaths_known(server, run)  # of a cancelled run that had to be killed, one
    status = (Path("/proc") / str(worker) / "status").read_text()
    os.kill(int(re.findall(r"PPid:\s*(\d+)", status)[0]), signal.SIGKILL)
    os.kill(worker, signal.SIGCONT)
    assert _ended(server, run)["state_name"] == "Crashed"
    wait_for(lambda: _deaths_known(server, run) > known, what="the worker to know")
    return _still_there(root, before)


def _deaths_known(server: Server, run: str) -> int:
    """Return of how many deaths of a run's process the worker has told the server."""
    return sum(WORKER_KNOWS in log["message"] for log in _logs(server, run))


def _kill_the_shard_process(server: Server, root: Path, before: Mapping[str, int]) -> None:
    worker, _ = _stop_in_the_middle(server, root, before)
    os.kill(worker, signal.SIGKILL)


def _stop_in_the_middle(
    server: Server, root: Path, before: Collection[str]
) -> tuple[int, Mapping[str, int]]:
    """Stop the process that makes shards after it has made two more; return its id and what is."""
    wait_for(
        lambda: len(_commit_times(root)) >= len(before) + 2,
        what="the first shards",
        every_seconds=0.02,
    )
    worker = _shard_process(server)
    os.kill(worker, signal.SIGSTOP)
    return worker, _commit_times(root)


def _still_there(root: Path, before: Mapping[str, int]) -> Mapping[str, int]:
    """Return when each shard was committed; none that was has been written again."""
    now = _commit_times(root)
    assert before.items() <= now.items(), "what was there was written again"
    return now


def _retry(page: Page, server: Server, run: str, *, attempt: int) -> None:
    _choose(page, server, run, "Retry")
    try:
        wait_for(lambda: _run(server, run)["run_count"] == attempt, what=f"attempt {attempt}")
    except AssertionError as error:  # seen once, on a busy machine
        state = _run(server, run)["state"]
        lines = [f"{log['timestamp']} {log['message']}" for log in _logs(server, run)[-20:]]
        raise AssertionError("\n".join([f"{error}: the run is {state}", *lines])) from error


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
    (deployment,) = server.post("deployments/filter", {})
    parameters = {"store": STORE, "home": home}
    created = server.post(
        f"deployments/{deployment['id']}/create_flow_run", {"parameters": parameters}
    )
    return str(created["id"])


def _run(server: Server, run: str) -> dict[str, Any]:
    (found,) = server.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return found  # type: ignore[no-any-return]


def _logs(server: Server, run: str) -> list[dict[str, Any]]:
    """Return what was logged for a run, oldest first."""
    found = server.post("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
    return sorted(found, key=lambda log: str(log["timestamp"]))


def _ended(server: Server, run: str) -> dict[str, Any]:
    wait_for(lambda: _run(server, run)["state_type"] in TERMINAL, what="the end of the run")
    return _run(server, run)


def _shard_tasks(server: Server, run: str, *, attempt: int, count: int) -> list[dict[str, Any]]:
    """Return the task runs of an attempt that make shards: `count`, once all are recorded."""

    def of_attempt() -> list[dict[str, Any]]:
        found = server.post(
            "task_runs/filter",
            {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"name": {"like_": "shards "}}},
        )
        return [task for task in found if task["flow_run_run_count"] == attempt]

    def are_recorded() -> bool:
        tasks = of_attempt()
        return len(tasks) >= count and all(task["state_type"] in TERMINAL for task in tasks)

    wait_for(are_recorded, what=f"{count} task runs")
    tasks = of_attempt()
    assert len(tasks) == count
    return tasks


def _root(server: Server, home: str) -> Path:
    return server.project / home / "stores" / "tiny-facts"


def _commit_times(root: Path) -> Mapping[str, int]:
    """Return when each commit record was written."""
    return {path.stem: path.stat().st_mtime_ns for path in root.glob("commits/*.json")}


def _shard_process(server: Server) -> int:
    """Return the id of the process that makes shards."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                command = (entry / "cmdline").read_bytes()
                if (
                    b"flows.workers.shard_worker" in command
                    and (entry / "cwd").readlink() == server.project
                ):
                    found.append(int(entry.name))
    (process,) = found
    return process
