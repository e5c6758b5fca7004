"""Two machines train one draft: through SIGTERM and SIGKILL, to the bits of one machine.

Each is a process of the command line on loopback; `tests/hosts` gives each a network of its own.
"""

import socket
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch

from flows.bridge.run_lock import LOCK_NAME
from tests.deployments.cli.terminal import eyas_here
from tests.machines import (
    Machine,
    none_left,
    run_path,
    start,
    wait_for_steps,
    weights,
    write_recipe,
)
from tests.waiting import wait_for

pytestmark = [pytest.mark.server, pytest.mark.slow]

Start = Callable[..., Machine]


@pytest.fixture(scope="module")
def reporting(prefect_server: str) -> dict[str, str]:
    """All machines report to one server: to start one takes longer than to train."""
    return {"PREFECT_API_URL": prefect_server}


@pytest.fixture(scope="module")
def recipe(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target_path: Path,
    conversations_path: Path,
    prefect_server: str,  # noqa: ARG001 (a flow needs one)
) -> Path:
    """A recipe with a store beside it."""
    folder = tmp_path_factory.mktemp("machines")
    path = write_recipe(folder / "recipe.yaml", tiny_target_path, conversations_path)
    made = eyas_here("run", "hidden-states", str(path), "--home", str(folder / "home"))
    assert made.returncode == 0, made.stderr
    return path


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    with none_left():
        yield


@pytest.fixture
def together() -> tuple[str, ...]:
    """Settings of two machines."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return ("training.nodes=2", f"training.rendezvous=127.0.0.1:{port}")


@pytest.fixture
def machine(
    recipe: Path, tmp_path: Path, together: tuple[str, ...], reporting: dict[str, str]
) -> Start:
    """Return what starts one of two machines by its number."""

    def start_one(number: int, run: str, *overrides: str) -> Machine:
        return start(
            "train",
            recipe,
            tmp_path / f"{run}-{number}.log",
            *(*together, *overrides),
            run=run,
            environment={"EYAS_NODE_RANK": str(number), **reporting},
        )

    return start_one


def test_stopped_killed_and_resumed_machines_end_in_the_bits_of_one(
    recipe: Path, machine: Start, tmp_path: Path, reporting: dict[str, str]
) -> None:
    two = run_path(recipe, "two")
    machines = [machine(0, "two"), machine(1, "two")]
    wait_for_steps(two, machines)
    machines[1].stop()  # Slurm and Kubernetes may take any
    assert "was stopped at step" in machines[0].failed()
    assert "by SIGTERM to one of its machines" in machines[1].failed()

    machines = [machine(0, "two"), machine(1, "two")]
    wait_for_steps(two, machines)
    machines[1].kill()
    said = machines[0].failed()
    assert "the connection to another machine was lost" in said
    assert "the last checkpoint is good: run the same command again on all machines" in said

    # The other one comes first: torchrun would give it rank 0.
    other = machine(1, "two")
    wait_for(lambda: "waiting for the first machine" in other.log.read_text(), what="the other")
    first = machine(0, "two")
    assert "and not the first: it wrote nothing" in other.ended_well()
    first.ended_well()
    assert (two / "report.html").exists()
    assert (two / LOCK_NAME).read_bytes().strip() == b""

    alone, log = "training.num_processes=2", tmp_path / "one.log"
    start("train", recipe, log, alone, run="one", environment=reporting).ended_well()
    found = weights(two)
    for name, tensor in weights(run_path(recipe, "one")).items():
        assert torch.equal(found[name], tensor), name


def test_machines_with_other_settings_are_told_so(machine: Start) -> None:
    first = machine(0, "differ")
    other = machine(1, "differ", "training.learning_rate=0.001")
    assert "learning_rate is 0.001 here and None on the first machine" in other.failed()
    assert "training cannot begin on all machines" in first.failed()


def test_machines_that_wait_in_vain_say_so(
    machine: Start, recipe: Path, together: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [("--set", one) for one in (*together, "training.node_timeout_seconds=5")]
    command = ("run", "train", str(recipe), "--home", str(recipe.parent / "home"), *chain(*sets))
    for number, expected in (
        (0, "not all 2 machines of run tiny-facts-alone came to 127.0.0.1:"),
        (1, "the first machine of run tiny-facts-alone does not wait"),
    ):
        monkeypatch.setenv("EYAS_NODE_RANK", str(number))
        ended = eyas_here(*command, "--run", "alone")
        assert ended.returncode == 1
        assert expected in " ".join(ended.stderr.split())
    patient = machine(1, "patient")
    wait_for(lambda: "waiting for the first machine" in patient.log.read_text(), what="it to wait")
    patient.stop()
    assert "was stopped by SIGTERM while it waited" in patient.failed()
    assert not run_path(recipe, "patient").exists(), "another machine writes nothing"
