"""A linear map that one step applies several times, with one product for its weight's gradient.

A bias is added to each output, and its gradient summed once over all uses, too.

Autograd would compute that gradient once per use and sum the results: in bfloat16 each sum is
rounded again, the products are small, and each addition reads and writes memory as large as the
weight.

Shapes: R rows of one use, I inputs, O outputs.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class RepeatedLinear:
    """Applies one weight to several inputs; valid for one backward pass.

    Inputs and the gradients of outputs are kept until the last use has been differentiated.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        """Take a weight [O, I] and perhaps a bias [O]; products are computed in `dtype`."""
        rounded = None if bias is None else bias.detach().to(dtype)
        self._uses = _Uses(weight=weight.detach().to(dtype), bias=rounded)
        self._token: Tensor = _Weight.apply(weight, bias, self._uses)  # type: ignore[no-untyped-call]  # torch

    def __call__(self, states: Tensor) -> Tensor:
        """Return [R, O] for states [R, I] in the dtype of products."""
        output: Tensor = _Use.apply(states, self._token, self._uses)  # type: ignore[no-untyped-call]  # torch
        return output


@dataclass(kw_only=True, slots=True)
class _Uses:
    weight: Tensor
    """[O, I] in the dtype of products"""
    bias: Tensor | None
    """[O]"""
    inputs: list[Tensor] = field(default_factory=list)
    """[R, I] each, in the order of the backward pass"""
    gradients: list[Tensor] = field(default_factory=list)
    """[R, O] each"""


class _Weight(torch.autograd.Function):
    """Represents the weight in the graph: its backward runs after that of all uses."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, uses: _Uses) -> Tensor:  # noqa: ANN401
        ctx.uses, ctx.dtype, ctx.has_bias = uses, weight.dtype, bias is not None
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN401
        uses: _Uses = ctx.uses
        of_outputs = torch.cat(uses.gradients)
        gradient = (of_outputs.T @ torch.cat(uses.inputs)).to(ctx.dtype)
        of_bias = of_outputs.sum(dim=0, dtype=ctx.dtype) if ctx.has_bias else None
        uses.gradients.clear()
        uses.inputs.clear()
        return gradient, of_bias, None


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, token: Tensor, uses: _Uses) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(states, token)
        ctx.uses = uses
        output = states @ uses.weight.T
        return output if uses.bias is None else output.add_(uses.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        states, token = ctx.saved_tensors
        uses: _Uses = ctx.uses
        uses.inputs.append(states)
        uses.gradients.append(grads[0])
        return grads[0] @ uses.weight, torch.zeros_like(token), None
