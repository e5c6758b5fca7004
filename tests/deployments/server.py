"""A real Prefect server with basic auth, a process worker, and the project folder they work in."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import yaml

from tests import tiny
from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS, wait_for

PREFECT = (sys.executable, "-m", "prefect")
NUM_CONVERSATIONS = 100
SECRET = "open-sesame-4711"  # noqa: S105 (planted)
"""Part of every secret that the server, the worker and its flows are given."""
AUTH = f"eyas:{SECRET}-auth"
_HEADERS = {
    "content-type": "application/json",
    "authorization": f"Basic {base64.b64encode(AUTH.encode()).decode()}",
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server with a worker, and the project folder they work in."""

    api_url: str
    folder: Path
    """Everything that server, worker and flows write is below it."""
    environment: Mapping[str, str]
    restart: Callable[[], None]
    """End the server, not the worker, and start it again."""

    @property
    def project(self) -> Path:
        """Where a person would type."""
        return self.folder / "project"

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a prefect command in the project folder."""
        return subprocess.run(
            [*PREFECT, "--no-prompt", *arguments],
            cwd=self.project,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """Call the REST API; try 503 (a busy database) again, as Prefect's own client does."""
        request = Request(  # noqa: S310 (loopback http)
            f"{self.api_url}/{path}", data=json.dumps(body).encode(), headers=_HEADERS
        )
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            try:
                with urlopen(request, timeout=LIMIT_SECONDS) as answer:  # noqa: S310
                    text = answer.read()
                return json.loads(text) if text else None
            except HTTPError as error:
                with error:
                    if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                        raise
            time.sleep(0.3)

    def flow_runs(self, flow_name: str) -> list[dict[str, Any]]:
        """Return the runs of a flow, newest first."""
        found: list[dict[str, Any]] = self.post(
            "flow_runs/filter",
            {"flows": {"name": {"any_": [flow_name]}}, "sort": "START_TIME_DESC"},
        )
        return found


@contextmanager
def running_server(folder: Path, target: Path) -> Iterator[Server]:
    """Start both, with a tiny recipe in place of those that ship."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(
        api_url=f"http://127.0.0.1:{port}/api",
        folder=folder,
        restart=lambda: restart(),  # noqa: PLW0108 (it is defined below)
        environment={
            **os.environ,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_API_AUTH_STRING": AUTH,
            "PREFECT_SERVER_API_AUTH_STRING": AUTH,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
            "PYTHONPATH": str(folder / "project"),
            "HF_TOKEN": f"{SECRET}-hf",
            "AWS_SECRET_ACCESS_KEY": f"{SECRET}-aws",
        },
    )
    _set_up_project(server.project, target)
    command = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    with ExitStack() as serving:

        def serve() -> None:
            serving.enter_context(_process(command, server, folder / "server.log"))
            wait_for(lambda: _is_healthy(server.api_url), what="the server")

        def restart() -> None:
            serving.close()
            serve()

        serve()
        worker = ("worker", "start", "--pool", "local", "--type", "process")  # it makes the pool
        with _process(worker, server, folder / "worker.log"):
            wait_for(lambda: bool(server.post("work_pools/filter", {})), what="a pool")
            yield server


def _set_up_project(project: Path, target: Path) -> None:
    """Copy the project, with one tiny recipe: a deployment takes a second or so to register."""
    shutil.copytree(
        ROOT,
        project,
        ignore=shutil.ignore_patterns(".*", "eyas-data", "tests", "docs", "*.egg-info"),
    )
    for path in (project / "deployments" / "recipes").glob("*.yaml"):
        path.unlink()
    source = tiny.write_conversations(project / "tiny.json", NUM_CONVERSATIONS)
    recipe = {
        "target": {"name": "tiny", "model": str(target), "dtype": "float32", "device": "cpu"},
        "dataset": {"name": "facts", "source": str(source), "max_length": 256},
        "store": {"shard_tokens": 1000, "shards_per_task": 6},
        "automation": {"watch_cron": "0 3 1 1 *", "on_new_data": True},
    }
    (project / "deployments" / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    rendered = subprocess.run(
        [sys.executable, "-m", "deployments", "render-deployments"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr


@contextmanager
def _process(arguments: tuple[str, ...], server: Server, log: Path) -> Iterator[None]:
    with log.open("a") as output:
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
