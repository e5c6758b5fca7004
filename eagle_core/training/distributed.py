"""The processes of one training run: one by default, several under torchrun.

Ranks share the packed batches of a step; weights and gradients are the same as if one process had
computed all of them, up to the rounding of float32 sums. Rank 0 is on the first machine, whatever
order the machines came in.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's, typed
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from eagle_core.errors import TransientError
from eagle_core.training.config import Sharding

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# FSDP2 and DTensor take a second to import, and only sharded training needs them.

_OWN_KEYS = "eyas"
_FIRST_RANK = "rank of the first machine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Rank and world size."""

    rank: int = 0
    world_size: int = 1
    board: Store | None = field(default=None, compare=False)
    """What processes on several machines read and write before the first step; None on one."""

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
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 (see above)

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

    def from_first(self, what: str, text: str | None) -> str:
        """Return the first process's `text`; the others pass None. Each `what` may be used once.

        Raises:
            TransientError: another machine ended before.

        """
        if self.board is None:
            assert text is not None  # noqa: S101 (one machine knows it)
            return text
        if text is not None:
            self.board.set(what, text)
        return _read(self.board, what)

    def tell(self, what: str, text: str) -> None:
        """Let the other processes read this process's `text` with `from_all`."""
        if self.board is not None:
            self.board.set(f"{what} of {self.rank}", text)

    def from_all(self, what: str, text: str) -> list[str]:
        """Return the `text` of each process, in the order of ranks. Each `what` may be used once.

        Raises:
            TransientError: another machine ended before.

        """
        if self.board is None:
            return [text]
        self.tell(what, text)
        return [_read(self.board, f"{what} of {rank}") for rank in range(self.world_size)]

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world_size > 1:
            distributed.barrier()


ONE_PROCESS = Processes()


@contextmanager
def join_processes(
    *, is_first_machine: bool = True, timeout: timedelta = default_pg_timeout
) -> Iterator[Processes]:
    """Yield rank and world size; under torchrun, connect the processes while the block runs.

    Modules wrapped by `parallel` should not outlive the block: they hold the connections.

    Args:
        is_first_machine: whether rank 0 is on this machine, of several.
        timeout: how long processes of several machines wait for each other, each time.

    Raises:
        TransientError: the machines cannot connect, or lost each other while the block ran.

    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or distributed.is_initialized():
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        yield Processes(rank=rank, world_size=world_size)
        return
    import torch.distributed.fsdp  # noqa: PLC0415 (imported later, it would keep the connections)

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    board: Store | None = None
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        distributed.init_process_group(backend)
    else:
        board = _connect_machines(backend, world_size, is_first_machine, timeout)
    try:
        yield Processes(rank=distributed.get_rank(), world_size=world_size, board=board)
    except RuntimeError as error:
        if board is None or not _is_of_connection(error):
            raise
        raise TransientError(
            "the connection to another machine was lost: it, or one of its processes, is gone, "
            f"failed (see its output), or did not answer for {timeout.total_seconds():.0f} s "
            "(training.node_timeout_seconds). Nothing but the steps since then is lost, the last "
            f"checkpoint is good: run the same command again on all machines ({error})"
        ) from error
    finally:
        distributed.destroy_process_group()
        _end_threads()


def _connect_machines(
    backend: str, world_size: int, is_first_machine: bool, timeout: timedelta
) -> Store:
    """Connect the processes of several machines, and return what they can all write on.

    torchrun orders machines by their addresses: ranks are turned so that the first machine has 0.
    """
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timeout,
        )
        board = PrefixStore(_OWN_KEYS, store)
        if is_first_machine and os.environ["LOCAL_RANK"] == "0":
            board.set(_FIRST_RANK, os.environ["RANK"])
        rank = (int(os.environ["RANK"]) - int(board.get(_FIRST_RANK))) % world_size
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except RuntimeError as error:  # of the store, of Gloo or of NCCL
        raise TransientError(
            "the machines met, but their processes cannot connect: all TCP ports must be open "
            "between them, and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if set, must name the "
            f"network that they share ({error})"
        ) from error
    return board


def _is_of_connection(error: RuntimeError) -> bool:
    """Return whether another machine did not answer; Gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def _read(board: Store, key: str) -> str:
    try:
        return str(board.get(key), "utf-8")
    except RuntimeError as error:
        raise TransientError(
            f"another machine ended before the first step, or does not answer; see its output "
            f"({error})"
        ) from error


def _end_threads() -> None:
    """Release the last references to process groups, so that their threads end.

    A thread that still holds a tensor when Python ends aborts the process ("terminate called
    without an active exception"; https://github.com/pytorch/pytorch/pull/179291), and torchrun then
    stops all others. DTensor's caches keep device meshes forever, and these keep their groups. So
    does an FSDP2 module that is still referred to: it has been seen to stay on one of two ranks.
    """
    for found in gc.get_objects():
        if type(found) is DeviceMesh:
            vars(found).get("_pg_registry", {}).clear()
        elif type(found).__name__ == "FSDPMeshInfo":
            found.shard_process_group = None
    gc.collect()


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a backward pass only adds to this process's own gradients."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    if not distributed.is_initialized():
        return nullcontext()
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 (see above)

    return _unsynced(module) if isinstance(module, FSDPModule) else nullcontext()


@contextmanager
def _unsynced(module: "FSDPModule") -> Iterator[None]:
    module.set_requires_gradient_sync(requires_gradient_sync=False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(requires_gradient_sync=True)


def whole(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; every process must call this at the same time."""
    if _is_plain(tensor):
        return tensor
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (see above)

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return `tensor` on the device of `parameter`, with the same sharding."""
    moved = tensor.to(parameter.device)
    if _is_plain(parameter) or not moved.ndim:
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415 (see above)

    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in {Tensor, nn.Parameter}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
