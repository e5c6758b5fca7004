"""A real Prefect server and worker, started as a person would: deploy, schedule, run, retry.

A server that merely answers its health check can still have a dead scheduler (ADR 0002), so a
schedule has to make a run here.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import yaml

from storage.store import Store
from tests import tiny

ROOT = Path(__file__).parents[2]
SHIPPED = ("smollm2", "llama3")
PREFECT = (sys.executable, "-m", "prefect")

pytestmark = [pytest.mark.server, pytest.mark.slow]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server with a worker, and the project folder they work in."""

    api_url: str
    project: Path
    environment: Mapping[str, str]

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a prefect command in the project folder."""
        return subprocess.run(
            [*PREFECT, "--no-prompt", *arguments],
            cwd=self.project,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def post(self, path: str, body: Mapping[str, object]) -> object:
        """Call the REST API."""
        request = Request(  # noqa: S310 (loopback http)
            f"{self.api_url}/{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urlopen(request, timeout=30) as answer:  # noqa: S310
            text = answer.read()
        return json.loads(text) if text else None

    def flow_runs(self, flow_name: str) -> list[dict[str, object]]:
        """Return the runs of a flow, newest first."""
        found = self.post(
            "flow_runs/filter",
            {"flows": {"name": {"any_": [flow_name]}}, "sort": "START_TIME_DESC"},
        )
        assert isinstance(found, list)
        return found


def wait_for(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _process(arguments: tuple[str, ...], server: Server, log: Path) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            [*PREFECT, *arguments],
            cwd=server.project,
            env=dict(server.environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_healthy(api_url: str) -> bool:
    try:
        with urlopen(f"{api_url}/health", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_target_path: Path) -> Iterator[Server]:
    """A server, a process worker, and a project with a tiny recipe beside the shipped ones."""
    folder = tmp_path_factory.mktemp("server")
    project = folder / "project"
    shutil.copytree(
        ROOT,
        project,
        ignore=shutil.ignore_patterns(".*", "eyas-data", "tests", "docs", "*.egg-info"),
    )
    port = _free_port()
    api_url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": str(project),
    }
    started = Server(api_url=api_url, project=project, environment=environment)
    _add_tiny_recipe(project, tiny_target_path)
    command = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    with _process(command, started, folder / "server.log"):
        wait_for(lambda: _is_healthy(api_url), seconds=120, what="the server")
        created = started.prefect("work-pool", "create", "local", "--type", "process")
        assert created.returncode == 0, created.stderr
        with _process(("worker", "start", "--pool", "local"), started, folder / "worker.log"):
            yield started


def _add_tiny_recipe(project: Path, target: Path) -> None:
    """Put the tiny recipe beside two that ship; registering all of them takes a minute more."""
    for path in (project / "deployments").glob("*.yaml"):
        if path.stem not in SHIPPED:
            path.unlink()
    source = tiny.write_conversations(project / "tiny.json", 40)
    recipe = {
        "target": {"name": "tiny", "model": str(target), "dtype": "float32", "device": "cpu"},
        "dataset": {"name": "facts", "source": str(source), "max_length": 256},
        "store": {"shard_tokens": 600, "shards_per_task": 3},
    }
    (project / "deployments" / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    rendered = subprocess.run(
        [sys.executable, "-m", "deployments", "render-deployments"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr


@pytest.fixture(scope="module")
def deployed(server: Server) -> Server:
    """Every deployment, registered by the one command."""
    ended = server.prefect("deploy", "--all")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return server


def test_one_command_registers_every_deployment(deployed: Server) -> None:
    listed = deployed.post("deployments/filter", {})
    assert isinstance(listed, list)
    names = {deployment["name"] for deployment in listed}
    assert {"smollm2", "llama3", "tiny", "sharegpt", "sharegpt-sample"} <= names
    assert len(listed) == len(
        yaml.safe_load((deployed.project / "prefect.yaml").read_text())["deployments"]
    )


def test_a_schedule_makes_a_run(deployed: Server) -> None:
    ended = deployed.prefect(
        "deployment", "schedule", "create", "dataset/facts", "--interval", "3600"
    )
    assert ended.returncode == 0, ended.stderr

    def scheduled() -> bool:
        return any(run["auto_scheduled"] for run in deployed.flow_runs("dataset"))

    wait_for(scheduled, seconds=120, what="a scheduled run")
    deployed.prefect("deployment", "schedule", "clear", "-y", "dataset/facts")


def test_run_from_the_command_line_then_retry_only_what_is_missing(deployed: Server) -> None:
    ended = deployed.prefect("deployment", "run", "hidden-states/tiny", "--watch")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    store = Store.open(str(deployed.project / "eyas-data" / "stores" / "tiny-facts"))
    before = store.commits()
    assert len(before) > 3
    lost = sorted(before)[1]
    store.revoke(lost)
    run = deployed.flow_runs("hidden-states")[0]

    # What the Retry button of the UI posts (ADR 0003).
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    deployed.post(f"flow_runs/{run['id']}/set_state", {"state": state, "force": True})

    def retried() -> bool:
        newest = deployed.flow_runs("hidden-states")[0]
        return newest["run_count"] == 2 and newest["state_name"] == "Completed"

    wait_for(retried, seconds=120, what="the retried run")
    assert {key: value.objects for key, value in store.commits().items()} == {
        key: value.objects for key, value in before.items()
    }
    made = deployed.post(
        "task_runs/filter",
        {"flow_runs": {"id": {"any_": [run["id"]]}}, "task_runs": {"name": {"like_": "shards "}}},
    )
    assert isinstance(made, list)
    names = [task["name"] for task in made if task["state_name"] == "Completed"]
    assert names.count("shards 00000-00000") == 1, names


def test_a_wrong_parameter_is_refused_before_a_run_exists(deployed: Server) -> None:
    count = len(deployed.flow_runs("hidden-states"))
    ended = deployed.prefect(
        "deployment", "run", "hidden-states/tiny", "--param", 'store={"shard_tokens": "many"}'
    )
    assert ended.returncode != 0
    assert "shard_tokens" in ended.stdout + ended.stderr
    assert len(deployed.flow_runs("hidden-states")) == count
