"""Which machine is the first, where machines meet, and what is refused before they do."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_decoder import decoding_place
from flows.bridge.run_lock import owner_of, sole_training
from flows.errors import MachinesApartError
from flows.online import online
from flows.workers import machines
from flows.workers.machines import (
    GLOO_INTERFACE,
    NODE_RANK,
    Meeting,
    find_meeting,
    interface_of,
    is_first_machine,
    open_meeting,
)
from flows.workers.run_of_machines import RunOfMachines

ELSEWHERE = "192.0.2.1"
"""An address for documentation: no machine's."""
TARGET = TargetConfig(name="tiny", model="/nowhere", device="cpu")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Listen on a free port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        yield opened


def two_machines(rendezvous: str = "127.0.0.1:29500") -> TrainingConfig:
    """Return settings for two machines."""
    return TrainingConfig(nodes=2, rendezvous=rendezvous)


def of(listener: socket.socket) -> TrainingConfig:
    """Return settings for two machines that meet where somebody listens."""
    return two_machines(f"127.0.0.1:{listener.getsockname()[1]}")


def test_machines_without_a_place_to_meet_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"nodes is 2, but rendezvous is not set.*HOST:PORT"):
        TrainingConfig(nodes=2)
    with pytest.raises(ValidationError, match="a port is a number from 1 to 65535"):
        TrainingConfig(nodes=2, rendezvous="host0:70000")
    for wrong in ("host0", "host0:port", "http://host0:29500", "host0:29500/"):
        with pytest.raises(ValidationError, match="rendezvous"):
            TrainingConfig(nodes=2, rendezvous=wrong)


def test_machines_count_for_the_steps_of_a_run_but_not_for_its_checkpoints() -> None:
    training = two_machines().model_copy(update={"num_processes": 3})
    assert training.world_size == 6
    assert training.identity() == TrainingConfig().identity()


def test_the_first_machine_is_the_one_that_the_rendezvous_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(NODE_RANK, raising=False)
    assert is_first_machine(TrainingConfig())
    assert is_first_machine(two_machines("127.0.0.1:29500"))
    assert is_first_machine(two_machines("localhost:29500"))
    assert not is_first_machine(two_machines(f"{ELSEWHERE}:29500"))
    assert not is_first_machine(two_machines("unknown.invalid:29500"))


def test_a_variable_may_number_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_RANK, "0")
    assert is_first_machine(two_machines(f"{ELSEWHERE}:29500"))
    monkeypatch.setenv(NODE_RANK, "1")
    assert not is_first_machine(two_machines())
    assert is_first_machine(TrainingConfig()), "one machine is always the first"
    for wrong in ("2", "-1", "first", ""):
        monkeypatch.setenv(NODE_RANK, wrong)
        with pytest.raises(ConfigError, match=r"EYAS_NODE_RANK is .* from 0 to 1"):
            is_first_machine(two_machines())


def test_the_first_machine_opens_a_port_that_is_free(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_PORT_FREE_SECONDS", 0.0)
    training = of(listener)
    with sole_training(tmp_path, nodes=2, rendezvous=training.rendezvous) as lock:
        with pytest.raises(ConfigError, match=r"port \d+ of training.rendezvous cannot be opened"):
            open_meeting(training, lock)
        listener.close()
        meeting = open_meeting(training, lock)
        assert open_meeting(TrainingConfig(), lock) is None
    assert meeting is not None
    assert (meeting.meeting_id, meeting.is_first) == (lock.token, True)
    assert meeting.local_address == "127.0.0.1"


def test_a_name_that_only_this_machine_reaches_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's /etc/hosts gives the machine's own name such an address."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(machines.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    with (
        sole_training(tmp_path) as lock,
        pytest.raises(ConfigError, match=r"host0 is 127.0.0.1, which no other machine reaches"),
    ):
        open_meeting(two_machines("host0:29500"), lock)


def test_a_network_interface_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = interface_of("127.0.0.1")
    assert own is not None
    monkeypatch.setenv(GLOO_INTERFACE, own)
    assert Meeting.of(two_machines(), "x", is_first=False).local_address == "127.0.0.1"
    monkeypatch.setenv(GLOO_INTERFACE, "nowhere0")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME is nowhere0.* it has .*" + own):
        Meeting.of(two_machines(), "x", is_first=False)
    assert interface_of(ELSEWHERE) is None


def find(training: TrainingConfig, run_path: Path) -> Meeting:
    """Look once."""
    return find_meeting(training, run_path, deadline=time.monotonic())


def test_another_machine_joins_the_attempt_that_the_lock_names(
    tmp_path: Path, listener: socket.socket
) -> None:
    training = of(listener)
    with sole_training(tmp_path, nodes=2, rendezvous=training.rendezvous) as lock:
        meeting = find(training, tmp_path)
        assert (meeting.meeting_id, meeting.is_first) == (lock.token, False)
        three = training.model_copy(update={"nodes": 3})
        with pytest.raises(MismatchError, match="nodes is 3 here, and 2 on the first machine"):
            find(three, tmp_path)
    with sole_training(tmp_path, nodes=2, rendezvous=training.rendezvous):
        assert find(training, tmp_path).meeting_id != meeting.meeting_id


def test_a_first_machine_that_never_comes_is_missed_in_time(
    tmp_path: Path, listener: socket.socket
) -> None:
    training = of(listener)
    with pytest.raises(MachinesApartError, match=r"names nobody who trains: `home` must be on"):
        find(training, tmp_path)
    with (
        sole_training(tmp_path),
        pytest.raises(MachinesApartError, match=r"trained by process \d+ .* for no other machine"),
    ):
        find(training, tmp_path)
    listener.close()
    with pytest.raises(
        MachinesApartError, match=r"does not answer.*same command.*node_timeout_seconds"
    ):
        find(training, tmp_path)


def test_a_lock_of_an_earlier_version_is_one_machine(tmp_path: Path) -> None:
    (tmp_path / ".training").write_text(
        '{"token": "0f", "machine": "m", "host": "h", "pid": 7, "user": "u", '
        '"since": "2026-01-01T00:00:00Z", "beat": 3}'
    )
    owner = owner_of(tmp_path)
    assert owner is not None
    assert (owner.token, owner.nodes, owner.rendezvous) == ("0f", 1, None)
    assert owner_of(tmp_path / "none") is None


def test_other_settings_on_another_machine_are_named(tmp_path: Path) -> None:
    run = RunOfMachines(title="one", target=TARGET, training=two_machines(), run_path=tmp_path)
    run.require_same(run)
    training = two_machines().model_copy(update={"seed": 3})
    other = run.model_copy(update={"training": training, "run_path": tmp_path / "x"})
    with pytest.raises(
        MismatchError, match=r"its folder is .*x' here.*training.seed is 3 here and 0 on the first"
    ):
        other.require_same(run)


def test_the_first_machine_decodes_in_a_child_while_others_wait() -> None:
    """Its own process must go on telling the others that it is alive."""
    assert decoding_place(TARGET, two_machines()).is_child
    assert not decoding_place(TARGET, TrainingConfig()).is_child


def test_online_on_several_machines_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    dataset = DatasetConfig(name="facts", source=str(tmp_path / "facts.json"))
    with pytest.raises(ConfigError, match=r"nodes is 2.*offline flow"):
        online.fn(
            target=TARGET, dataset=dataset, training=two_machines(), home=str(tmp_path / "home")
        )
    assert not list(tmp_path.iterdir())
