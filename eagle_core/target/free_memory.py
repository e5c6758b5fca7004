"""Free memory of the devices that a target may use, and of this machine."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeMemory:
    """Bytes that a process may take."""

    main: int
    gpus: tuple[int, ...] = ()
    """Of each GPU that the process sees; none if the target runs on the CPU."""

    @classmethod
    def of(cls, device: torch.device, *, num_processes: int = 1) -> "FreeMemory":
        """Return what is free for one of `num_processes` that share the device.

        With a device number, only this GPU counts.
        """
        found = psutil.virtual_memory()
        main = _share(*_within_limit(found.available, found.total), num_processes)
        if device.type != "cuda":
            return cls(main=main)
        numbers = range(torch.cuda.device_count()) if device.index is None else [device.index]
        return cls(
            main=main,
            gpus=tuple(
                _share(*torch.cuda.mem_get_info(number), num_processes) for number in numbers
            ),
        )

    @property
    def on_device(self) -> int:
        """Return what is free where a target that is not spread runs."""
        return self.gpus[0] if self.gpus else self.main


def _share(free: int, total: int, num_processes: int) -> int:
    """Return what one process may take: the others may not have begun to take theirs."""
    return min(free, total // num_processes)


def _within_limit(free: int, total: int, cgroup: Path = _CGROUP) -> tuple[int, int]:
    """Return both numbers within the limit of a container, if there is one."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return free, total
    reclaimable = int(stat.get("inactive_file", 0))
    return min(free, max(0, limit - used + reclaimable)), min(total, limit)
