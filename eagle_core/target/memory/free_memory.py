"""Memory of the devices that a target may use, and of this machine."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryShare:
    """What one of several processes on a machine may take."""

    main: int | None = None
    """Bytes of main memory; None if it is alone."""
    processes_per_gpu: int = 1


ALONE = MemoryShare()


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that a process may take."""

    main: int
    gpus: tuple[int, ...] = ()
    """Of each GPU that the process sees; none if the target runs on the CPU."""

    @classmethod
    def free(
        cls, device: torch.device, share: MemoryShare = ALONE, *, most_gpus: int | None = None
    ) -> "Memory":
        """Return what is free now. With a device number, only this GPU counts.

        On each GPU this takes some memory for CUDA itself: `most_gpus` are asked.
        """
        main, _ = _main()
        return cls(
            main=main if share.main is None else min(main, share.main),
            gpus=tuple(_free_of_gpu(number, share) for number in _gpus(device)[:most_gpus]),
        )

    @classmethod
    def all(cls, device: torch.device) -> "Memory":
        """Return what there is, used or free; takes no memory of a GPU."""
        _, total = _main()
        sizes = (torch.cuda.get_device_properties(number).total_memory for number in _gpus(device))
        return cls(main=total, gpus=tuple(sizes))

    @property
    def on_device(self) -> int:
        """Return what there is where a target that is not spread runs."""
        return self.gpus[0] if self.gpus else self.main


def free_main_memory() -> int:
    """Return the free bytes of main memory, within the limit of a container."""
    return _main()[0]


def _gpus(device: torch.device) -> range:
    if device.type != "cuda":
        return range(0)
    if device.index is not None:
        return range(device.index, device.index + 1)
    return range(torch.cuda.device_count())


def _free_of_gpu(number: int, share: MemoryShare) -> int:
    """Return the free bytes of a GPU, with those that torch holds for nothing at present."""
    free, total = torch.cuda.mem_get_info(number)
    unused = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    return min(free + unused, total // share.processes_per_gpu)


def _main() -> tuple[int, int]:
    found = psutil.virtual_memory()
    return _within_limit(found.available, found.total)


def _within_limit(free: int, total: int, cgroup: Path = _CGROUP) -> tuple[int, int]:
    """Return both numbers within the limit of a container, if there is one."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return free, total
    reclaimable = sum(int(stat.get(name, 0)) for name in _RECLAIMABLE)
    return min(free, max(0, limit - used + reclaimable)), min(total, limit)
