"""Copies of batches to a device, begun one step before they are used.

A copy from pinned memory on a stream of its own runs beside the kernels of the step before. The
stream of the kernels waits for it, the processor does not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from eagle_core.training.packing import PackedBatch

Batches = tuple[PackedBatch, ...]


class DeviceCopies(Protocol):
    """Copies to one device."""

    def begin(self, batches: Batches) -> Callable[[], Batches]:
        """Begin to copy pinned batches, from any thread.

        Returns a function for the thread that uses them: it returns the copies, and lets what is
        computed after it wait for them.
        """


class CudaCopies:
    """Copies to a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Copy to `device`."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch

    def begin(self, batches: Batches) -> Callable[[], Batches]:
        """See `DeviceCopies`."""
        with torch.cuda.stream(self._stream):
            copies = tuple(batch.to(self._device, non_blocking=True) for batch in batches)
            done = self._stream.record_event()
        return partial(self._finish, copies, done)

    def _finish(self, copies: Batches, done: torch.cuda.Event) -> Batches:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(done)
        for tensor in _tensors(copies):
            tensor.record_stream(computing)  # else their memory is reused while kernels read it
        return copies


def device_copies(device: torch.device) -> DeviceCopies | None:
    """Return what copies to `device`; None if its batches need no copy ahead, as on a CPU."""
    return CudaCopies(device) if device.type == "cuda" else None


def _tensors(batches: Batches) -> Sequence[torch.Tensor]:
    own = [tensor for batch in batches for tensor in batch.tensors().values()]
    return own + [tensor for batch in batches if batch.plan for tensor in batch.plan.tensors()]
