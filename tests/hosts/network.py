"""Hosts on one machine: network namespaces, joined by a bridge.

This process must be in a network namespace of its own (`make test-hosts`): it is the first host,
the network of the machine is never touched, and all ends with the last process in it.
"""

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_for

FIRST_ADDRESS = "10.99.0.1"
"""Of this process."""
SPACES = (("net", "net"), ("mount", "mnt"))
RAY_FOLDER = Path("/tmp/ray")
"""The one folder of which each host has its own; all others are shared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A namespace with one cable to the bridge."""

    name: str
    address: str
    holder: int
    """Process that keeps the namespace."""

    @property
    def space(self) -> Path:
        """Return the link that names its namespace."""
        return Path(f"/proc/{self.holder}/ns/net")

    @property
    def prefix(self) -> tuple[str, ...]:
        """Return what stands before a command that shall run on it."""
        spaces = (f"--{kind}=/proc/{self.holder}/ns/{file}" for kind, file in SPACES)
        return ("nsenter", *spaces, f"--wd={Path.cwd()}")

    def unplug(self) -> None:
        """Cut its cable: packets are lost in silence."""
        _run("ip", "link", "set", self.name, "down")

    def plug(self) -> None:
        """Join its cable again."""
        _run("ip", "link", "set", self.name, "up")

    def lose(self) -> None:
        """Let it disappear for good: nobody hears how its processes ended."""
        self.unplug()
        space = self.space.readlink()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is somebody else's
                if (entry / "ns" / "net").readlink() == space:
                    os.kill(int(entry.name), signal.SIGKILL)


class Network:
    """A bridge that hosts are plugged into; their addresses count up from that of this process."""

    def __init__(self) -> None:
        self._numbers = itertools.count(2)

    @contextmanager
    def host(self, name: str) -> Iterator[Host]:
        """Yield a new host until the block ends."""
        own, address = Path("/proc/self/ns/net").readlink(), f"10.99.0.{next(self._numbers)}"
        with subprocess.Popen(["unshare", "--net", "--mount", "sleep", "infinity"]) as holder:
            try:
                host = Host(name=name, address=address, holder=holder.pid)
                wait_for(lambda: host.space.readlink() != own, what=f"the network of {name}")
                ends = ("type", "veth", "peer", "name", "cable", "netns", str(holder.pid))
                _run("ip", "link", "add", name, *ends)
                _run("ip", "link", "set", name, "master", "bridge", "up")
                _make_ray_folder(*host.prefix)
                _run(*host.prefix, "ip", "link", "set", "lo", "up")
                _run(*host.prefix, "ip", "address", "add", f"{address}/24", "dev", "cable")
                _run(*host.prefix, "ip", "link", "set", "cable", "up")
                yield host
            finally:
                holder.kill()


@contextmanager
def network() -> Iterator[Network]:
    """Yield a network of which this process is the first host, until the block ends."""
    _make_ray_folder()
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "bridge", "type", "bridge")
    try:
        _run("ip", "address", "add", f"{FIRST_ADDRESS}/24", "dev", "bridge")
        _run("ip", "link", "set", "bridge", "up")
        yield Network()
    finally:
        _run("ip", "link", "delete", "bridge")


def _make_ray_folder(*prefix: str) -> None:
    RAY_FOLDER.mkdir(exist_ok=True)
    _run(*prefix, "mount", "-t", "tmpfs", "tmpfs", str(RAY_FOLDER))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
