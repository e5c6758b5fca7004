"""The machines that train one run: which one is the first, and where they meet.

The first machine owns the run. It is the one that the rendezvous names, unless EYAS_NODE_RANK
decides. It writes into the lock of the run's folder what the others need to join this attempt and
no other: they must see the same folder, and a machine that comes late or back never joins what has
ended.
"""

import errno
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import psutil

from eagle_core.errors import ConfigError, MismatchError
from eagle_core.training.config import TrainingConfig
from flows.bridge.run_lock import LOCK_NAME, RunLock, owner_of
from flows.errors import MachinesApartError

NODE_RANK = "EYAS_NODE_RANK"
"""Environment variable: 0 on the first machine, another number on the others."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_PORT_FREE_SECONDS = 60.0
"""How long the first machine waits for its own processes of an earlier attempt to end."""
_LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """One attempt of several machines to train together, as one of them sees it."""

    meeting_id: str
    """The same on all machines, and of this attempt only."""
    num_machines: int
    rendezvous: str
    """HOST:PORT."""
    is_first: bool
    timeout_seconds: int
    local_address: str
    """Of this machine, as the others see it."""

    @classmethod
    def of(cls, training: TrainingConfig, meeting_id: str, *, is_first: bool) -> Self:
        """Return a meeting with the settings of a run of several machines."""
        rendezvous = _rendezvous(training)
        return cls(
            meeting_id=meeting_id,
            num_machines=training.nodes,
            rendezvous=rendezvous,
            is_first=is_first,
            timeout_seconds=training.node_timeout_seconds,
            local_address=_local_address(rendezvous),
        )


def is_first_machine(training: TrainingConfig) -> bool:
    """Return whether this machine owns the run.

    Raises:
        ConfigError: EYAS_NODE_RANK is no number of a machine.

    """
    if training.nodes == 1:
        return True
    given = os.environ.get(NODE_RANK)
    if given is None:
        return any(map(_is_own, _addresses(_host_and_port(_rendezvous(training))[0])))
    if not given.isdecimal() or int(given) >= training.nodes:
        raise ConfigError(
            f"{NODE_RANK} is {given!r}, but training.nodes is {training.nodes}: number the "
            f"machines from 0 to {training.nodes - 1}, the first one 0, or leave {NODE_RANK} unset "
            "where the first machine has the address in training.rendezvous"
        )
    return int(given) == 0


def open_meeting(training: TrainingConfig, lock: RunLock) -> Meeting | None:
    """Return where the first machine waits for the others; None for one machine.

    Raises:
        ConfigError: the port is in use, or the other machines could not reach the address.

    """
    if training.nodes == 1:
        return None
    meeting = Meeting.of(training, lock.token, is_first=True)
    host, port = _host_and_port(meeting.rendezvous)
    is_meant = host == "localhost" or _is_loopback(host)
    if _is_loopback(meeting.local_address) and not is_meant and GLOO_INTERFACE not in os.environ:
        raise ConfigError(
            f"training.rendezvous is {meeting.rendezvous}, but on this machine {host} is "
            f"{meeting.local_address}, which no other machine reaches (/etc/hosts often has it "
            "so). Give the machine's address in its place, or name the network that the machines "
            f"share in {GLOO_INTERFACE}"
        )
    _require_free(port)
    return meeting


def find_meeting(training: TrainingConfig, run_path: Path, *, deadline: float) -> Meeting:
    """Return where the first machine waits, as soon as it does.

    Args:
        training: settings of the run, the same on all machines.
        run_path: folder of the run, the same on all machines.
        deadline: `time.monotonic` until which to wait.

    Raises:
        MachinesApartError: the first machine does not wait for others until then; says why.
        MismatchError: it waits for another number of machines.

    """
    said = ""
    while True:
        obstacle = _not_answering(_rendezvous(training))
        # Who answers has written the lock before: so it is read afterwards.
        owner = owner_of(run_path)
        if not obstacle and owner is None:
            obstacle = (
                f"{training.rendezvous} answers, but {run_path / LOCK_NAME} names nobody who "
                "trains: `home` must be on a file system that all machines share, at the same path"
            )
        elif not obstacle and owner is not None:
            if owner.rendezvous == training.rendezvous:
                _require_same_number(training, owner.nodes)
                return Meeting.of(training, owner.token, is_first=False)
            obstacle = f"{run_path.name} is trained by {owner}, which waits for no other machine"
        if time.monotonic() > deadline:
            raise MachinesApartError(
                f"the first machine of run {run_path.name} does not wait for this one: {obstacle}. "
                "Run the same command on all machines, one of which has the address in "
                f"training.rendezvous (or {NODE_RANK}=0); raise training.node_timeout_seconds if "
                "the first one takes longer to begin"
            )
        if obstacle != said:
            logger.warning("waiting for the first machine of run %s: %s", run_path.name, obstacle)
            said = obstacle
        time.sleep(_LOOK_SECONDS)


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with an address, if one has it."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return name
    return None


def _require_same_number(training: TrainingConfig, number: int) -> None:
    if number != training.nodes:
        raise MismatchError(
            f"training.nodes is {training.nodes} here, and {number} on the first machine: run the "
            "same command on all machines"
        )


def _rendezvous(training: TrainingConfig) -> str:
    assert training.rendezvous is not None  # noqa: S101 (TrainingConfig requires it)
    return training.rendezvous


def _host_and_port(rendezvous: str) -> tuple[str, int]:
    host, _, port = rendezvous.partition(":")
    return host, int(port)


def _addresses(host: str) -> list[str]:
    """Return the addresses of a host; none while its name is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _is_own(address: str) -> bool:
    """Return whether an address is this machine's: only such can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _local_address(rendezvous: str) -> str:
    """Return this machine's address in the network that the machines share."""
    named = os.environ.get(GLOO_INTERFACE)
    if named is not None:
        for one in psutil.net_if_addrs().get(named, ()):
            if one.family == socket.AF_INET:
                return one.address
        raise ConfigError(
            f"{GLOO_INTERFACE} is {named}, but this machine has no such network interface with an "
            f"IPv4 address; it has {', '.join(psutil.net_if_addrs())}"
        )
    host, port = _host_and_port(rendezvous)
    for address in _addresses(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # sends nothing
            return str(probe.getsockname()[0])
    raise ConfigError(
        f"training.rendezvous is {rendezvous}, but {host} is no known host, or no network leads to "
        "it; give the address of the first machine"
    )


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _not_answering(rendezvous: str) -> str:
    """Return why nothing answers at HOST:PORT; "" if something does."""
    try:
        with socket.create_connection(_host_and_port(rendezvous), timeout=_CONNECT_SECONDS):
            return ""
    except OSError as error:
        return f"{rendezvous} does not answer ({error})"


def _require_free(port: int) -> None:
    deadline = time.monotonic() + _PORT_FREE_SECONDS
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                is_used = error.errno == errno.EADDRINUSE
                if not is_used or time.monotonic() > deadline:
                    raise ConfigError(
                        f"port {port} of training.rendezvous cannot be opened on this machine "
                        f"({error.strerror}); end what uses it, or choose another port on all "
                        "machines"
                    ) from error
            else:
                return
        time.sleep(_LOOK_SECONDS)
