"""A device that is not there: finds tensors that a GPU run would leave on the CPU.

Tensors "elsewhere" say that they are on the meta device but compute on CPU tensors of their own.
An operation that mixes them with CPU tensors, or with a generator of the CPU's, fails as it would
with CUDA ones; scalars may mix.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
_aten = torch.ops.aten
_COPIES = (_aten._to_copy, _aten.copy_, _aten.to)


_WAITING = {
    *(_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal),
    *(_aten.unique_consecutive, _aten._unique2, _aten.unique_dim, _aten.bincount),
    _aten.repeat_interleave,
}
"""Operations whose result, or its size, the host has to know."""
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}


class MixedDevicesError(RuntimeError):
    """Tensors here and elsewhere met in one operation."""


class WaitedForError(RuntimeError):
    """The host would have waited for a value that is elsewhere."""


class TensorElsewhere(Tensor):
    """Says that it is elsewhere."""

    here: Tensor

    @staticmethod
    def __new__(cls: type[Self], here: Tensor) -> Self:
        """Wrap a CPU tensor."""
        wrapped: Self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # torch
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=ELSEWHERE
        )
        wrapped.here = here
        return wrapped

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute here, and say that the result is elsewhere."""
        return _dispatch(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, dict(kwargs or {}))


class _Numbers(TorchFunctionMode):
    """`torch.tensor` and `tolist` copy numbers where no dispatch mode sees it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.tensor and named.get("device") == ELSEWHERE:
            return torch.tensor(*args, **{**named, "device": "cpu"}).to(ELSEWHERE)
        if func is Tensor.tolist:
            return _here(args[0]).tolist()
        return func(*args, **named)


def _dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    elsewhere = [tensor for tensor in tensors if isinstance(tensor, TensorElsewhere)]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if func.overloadpacket not in _COPIES:
        _require_one_device(func, tensors)
    is_elsewhere = ELSEWHERE in devices if devices else bool(elsewhere)
    if is_elsewhere and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise MixedDevicesError(f"{func} with a generator of the CPU's")
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    same = {id(tensor.here): tensor for tensor in elsewhere}  # operations in place return theirs

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_elsewhere:
            return value
        return same[id(value)] if id(value) in same else TensorElsewhere(value)

    return tree_map(placed, result)


def _require_one_device(func: Any, tensors: Sequence[Tensor]) -> None:
    kinds = {isinstance(tensor, TensorElsewhere) for tensor in tensors if tensor.ndim}
    if len(kinds) > 1:
        places = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
        raise MixedDevicesError(f"{func} of tensors in two places: {places}")


def _here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.here if isinstance(value, TensorElsewhere) else value


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """Yield the device that tensors can be moved `.to` while the block runs."""
    autocast: Callable[..., Any] = torch.autocast

    def autocast_anywhere(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, _Factories(), _Numbers():
        patch.setattr(torch, "autocast", autocast_anywhere)
        optimizer = sys.modules["torch.optim.optimizer"]  # torch.optim has another of that name
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
        yield ELSEWHERE


class _Unasked(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        leaves = tree_flatten((args, named))[0]
        packet = func.overloadpacket
        if any(isinstance(leaf, TensorElsewhere) for leaf in leaves):
            masks = tree_flatten(args[1])[0] if packet in _INDEXING else []
            is_masked = any(isinstance(m, Tensor) and m.dtype == torch.bool for m in masks)
            is_fetched = packet in _COPIES and torch.device("cpu") in leaves
            if packet in _WAITING or is_masked or is_fetched:
                raise WaitedForError(str(func))
        return func(*args, **named)


class _UnaskedNumbers(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.tolist and isinstance(args[0], TensorElsewhere):
            raise WaitedForError("tolist")
        return func(*args, **dict(kwargs or {}))


@contextmanager
def never_waiting() -> Iterator[None]:
    """Refuse, inside of `pretend_device`, what makes the host wait for values elsewhere."""
    with _Unasked(), _UnaskedNumbers():
        yield
