"""A real Prefect server and worker, started as a person would: deploy, schedule, run, retry, watch.

A server that merely answers its health check can still have a dead scheduler (ADR 0002), so a
schedule has to make a run here. The server asks for a password, and is given secrets to keep.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml

from flows.orchestration.event_names import DATASET_CHANGED, SNAPSHOT_PUBLISHED
from storage.store import Store
from tests import tiny
from tests.deployments.server import (
    NUM_CONVERSATIONS,
    PREFECT,
    SECRET,
    Server,
    running_server,
)
from tests.storage.synthetic import nameless
from tests.waiting import LIMIT_SECONDS, wait_for

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_target_path: Path) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server"), tiny_target_path) as started:
        yield started


@pytest.fixture(scope="module")
def deployed(server: Server) -> Server:
    """Every deployment, registered by the one command."""
    ended = server.prefect("deploy", "--all")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return server


@pytest.fixture(scope="module")
def store(deployed: Server) -> Store:
    """The hidden states of the tiny target, by a run from the command line."""
    ended = deployed.prefect("deployment", "run", "hidden-states/tiny", "--watch")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Store.open(str(deployed.project / "eyas-data" / "stores" / "tiny-facts"))


def test_one_command_registers_every_deployment(deployed: Server) -> None:
    listed = deployed.post("deployments/filter", {})
    assert {deployment["name"] for deployment in listed} == {"tiny", "facts"}
    assert len(listed) == len(
        yaml.safe_load((deployed.project / "prefect.yaml").read_text())["deployments"]
    )
    (watch,) = (one for one in listed if one["schedules"])
    assert watch["schedules"][0]["schedule"]["cron"] == "0 3 1 1 *"


def test_a_schedule_makes_a_run(deployed: Server) -> None:
    ended = deployed.prefect(
        "deployment", "schedule", "create", "dataset/facts", "--interval", "3600"
    )
    assert ended.returncode == 0, ended.stderr

    def scheduled() -> bool:
        return any(run["auto_scheduled"] for run in deployed.flow_runs("dataset"))

    wait_for(scheduled, what="a scheduled run")
    deployed.prefect("deployment", "schedule", "clear", "-y", "dataset/facts")


def test_without_the_password_the_server_says_nothing(deployed: Server, tmp_path: Path) -> None:
    bare = Request(  # noqa: S310 (loopback http)
        f"{deployed.api_url}/deployments/filter",
        data=b"{}",
        headers={"content-type": "application/json"},
    )
    with pytest.raises(HTTPError) as refused:
        urlopen(bare, timeout=LIMIT_SECONDS)  # noqa: S310
    with refused.value:
        assert refused.value.code == 401
    environment = {**deployed.environment, "PREFECT_HOME": str(tmp_path)}
    del environment["PREFECT_API_AUTH_STRING"]
    ended = subprocess.run(
        [*PREFECT, "deployment", "ls"],
        cwd=tmp_path,
        env={**environment, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert ended.returncode != 0
    assert "tiny" not in ended.stdout


def test_new_data_is_seen_and_only_missing_states_are_computed(
    deployed: Server, store: Store
) -> None:
    """What is missing is what the new data needs, and a shard that was lost meanwhile."""
    before = store.commits()
    assert len(before) > 3
    lost = sorted(before)[1]
    store.revoke(lost)
    runs = len(deployed.flow_runs("hidden-states"))
    tiny.write_conversations(deployed.project / "tiny.json", NUM_CONVERSATIONS * 101 // 100)
    ended = deployed.prefect("deployment", "run", "watch/facts")
    assert ended.returncode == 0, ended.stderr

    def computed() -> bool:
        found = deployed.flow_runs("hidden-states")
        return len(found) == runs + 1 and found[0]["state_name"] == "Completed"

    wait_for(computed, what="the run that the changed data started")
    after = store.commits()
    new = {key: record for key, record in after.items() if key not in before}
    assert sum(len(record.sample_ids) for record in new.values()) == NUM_CONVERSATIONS // 100
    kept = before.keys() - {lost}
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert nameless(after[lost]) == nameless(before[lost]), "the very bytes that were lost"

    def told(event: str) -> list[dict[str, object]]:
        found = deployed.post("events/filter", {"filter": {"event": {"name": [event]}}})
        return [one["payload"] for one in found["events"]]

    assert len(told(DATASET_CHANGED)) == 1
    made = {"snapshot_id": store.snapshot().snapshot_id, "shards_made": len(new) + 1}
    wait_for(lambda: made in told(SNAPSHOT_PUBLISHED), what="the snapshot's event")


def test_lost_runs_are_marked_by_the_automation_that_ships(deployed: Server) -> None:
    path = "deployments/automations/lost-runs.yaml"
    ended = deployed.prefect("automation", "create", "--from-file", path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = deployed.post("automations/filter", {})
    (made,) = (one for one in found if one["name"] == "crash-lost-runs")
    assert made["enabled"]
    assert made["trigger"]["posture"] == "Proactive"
    assert made["actions"][0]["state"] == "CRASHED"


def test_a_wrong_parameter_is_refused_before_a_run_exists(deployed: Server) -> None:
    count = len(deployed.flow_runs("hidden-states"))
    ended = deployed.prefect(
        "deployment", "run", "hidden-states/tiny", "--param", 'store={"shard_tokens": "many"}'
    )
    assert ended.returncode != 0
    assert "shard_tokens" in ended.stdout + ended.stderr
    signed = f"https://me:{SECRET}-url@127.0.0.1/a.json"
    ended = deployed.prefect(
        *("deployment", "run", "hidden-states/tiny"),
        *("--param", f'dataset={{"name": "facts", "source": "{signed}"}}'),
    )
    assert ended.returncode != 0
    assert len(deployed.flow_runs("hidden-states")) == count


def test_no_secret_is_written_anywhere(deployed: Server, store: Store) -> None:
    del store  # a flow has run with the secrets in its environment
    database = deployed.folder / "prefect" / "prefect.db"
    assert "hidden-states-tiny-facts" in json.dumps(deployed.post("flow_runs/filter", {}))
    files = [path for path in deployed.folder.rglob("*") if path.is_file()]
    assert database in files
    holding = [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not holding
    found = b"".join(path.read_bytes() for path in files if path.name.startswith("prefect.db"))
    assert b"hidden-states-tiny-facts" in found  # what is looked for would be found like this
