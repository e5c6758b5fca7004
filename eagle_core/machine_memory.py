"""How much memory this machine has."""

import os
from pathlib import Path


def memory_bytes() -> int:
    """Return the memory of this machine, or of its container if that has less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no limit, or another system
        return machine
    return min(machine, limit)
