"""The processes of one training run: one by default, several under torchrun.

Ranks share the packed batches of a step; weights and gradients are the same as if one process had
computed all of them, up to the rounding of float32 sums.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from eagle_core.training.config import Sharding


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Rank and world size."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Return whether this process writes checkpoints and reports."""
        return self.rank == 0

    def parallel(self, module: nn.Module, sharding: Sharding) -> nn.Module:
        """Wrap `module` so that its backward pass averages gradients over all processes.

        Args:
            module: on its device; all processes hold equal weights.
            sharding: "replicate" keeps the full module on each rank (DDP), "shard" a part (FSDP2).

        """
        if self.world_size == 1:
            return module
        if sharding == "replicate":
            return DistributedDataParallel(module)
        fully_shard(module)
        return module

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        if self.world_size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any process, so that all act alike."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=_device())
        return bool(self.total(flags) > 0)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world_size > 1:
            distributed.barrier()


ONE_PROCESS = Processes()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Yield rank and world size; under torchrun, connect the processes while the block runs.

    Modules wrapped by `parallel` should not outlive the block: they hold the connections.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or distributed.is_initialized():
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        yield Processes(rank=rank, world_size=world_size)
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(rank=distributed.get_rank(), world_size=world_size)
    finally:
        distributed.destroy_process_group()
        _end_threads()


def _end_threads() -> None:
    """Release the last references to process groups, so that their threads end.

    A thread that still holds a tensor when Python ends aborts the process ("terminate called
    without an active exception"; https://github.com/pytorch/pytorch/pull/179291), and torchrun then
    stops all others. DTensor's caches keep device meshes forever, and these keep their groups.
    """
    for found in gc.get_objects():
        if type(found) is DeviceMesh:
            vars(found).get("_pg_registry", {}).clear()
    gc.collect()


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a backward pass only adds to this process's own gradients."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    if isinstance(module, FSDPModule):
        return _unsynced(module)
    return nullcontext()


@contextmanager
def _unsynced(module: FSDPModule) -> Iterator[None]:
    module.set_requires_gradient_sync(requires_gradient_sync=False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(requires_gradient_sync=True)


def whole(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; every process must call this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return `tensor` on the device of `parameter`, with the same sharding."""
    moved = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and moved.ndim:
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
