"""The processes of one training run: one by default, several under torchrun.

Ranks split the packed batches of a step between them; weights and gradients are the same as if one
process had worked through all of them, up to the rounding of float32 sums.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Sharding = Literal["replicate", "shard"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among its fellows."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this one writes checkpoints and reports."""
        return self.rank == 0

    def parallel(self, module: nn.Module, sharding: Sharding) -> nn.Module:
        """Return `module` so that its backward pass averages gradients over all processes.

        Args:
            module: on its device; all processes hold equal weights.
            sharding: "replicate" keeps all of it on each rank (DDP), "shard" a part (FSDP2).

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
        """Tell whether `flag` holds on any process: all then act alike."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=_device())
        return bool(self.total(flags) > 0)

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.world_size > 1:
            distributed.barrier()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Yield this process's place; under torchrun, connect it to the others while the block runs.

    Modules that became `parallel` should not outlive the block: they hold the connections.
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
    """Let go of the last references to process groups: their threads end with them.

    One that still holds a tensor when Python ends aborts the process ("terminate called without an
    active exception"; https://github.com/pytorch/pytorch/pull/179291), and torchrun then stops all
    others. DTensor's caches keep device meshes for ever, and these their groups.
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
    """Return a tensor with all its shards; every process must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return `tensor` on the device of `parameter`, sharded as that is."""
    moved = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and moved.ndim:
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
