"""Throughput, waiting time and memory of a run."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eagle_core.training.loader import LoadedStep


class ThroughputMeter:
    """Measures from its creation on."""

    def __init__(self, device: torch.device) -> None:
        """Measure the memory of `device`."""
        self._device = device
        self._started = time.monotonic()
        self._num_tokens = self._num_supervised = 0
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time in the block: nothing trains meanwhile."""
        begun = time.monotonic()
        yield
        self._started += time.monotonic() - begun

    def add(self, loaded: LoadedStep) -> None:
        """Count the tokens of a step, without context."""
        self._num_tokens += sum(batch.num_own_tokens for batch in loaded.batches)
        self._num_supervised += loaded.num_supervised

    @property
    def tokens_per_second(self) -> float:
        """Return this process's tokens per second; 0 before the first step."""
        return self._num_tokens / max(self._seconds, 1e-9)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def scalars(self) -> dict[str, float]:
        """Return all metrics by name: fractions are 0 to 1, memory is the peak in GiB."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "supervised_fraction": self._num_supervised / max(1, self._num_tokens),
            "data_wait_fraction": self._waited / max(self._seconds, 1e-9),
            "peak_memory_gib": self._peak_bytes() / 2**30,
        }

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
