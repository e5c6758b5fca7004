"""The attention of the training-time test in bfloat16, against float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from eagle_core.training import attention
from eagle_core.training.attention import packed_ttt_attention

NUM_TOKENS, BORDER = 96, 40


def inputs(seed: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return queries, keys, values and own keys and values; a slope; indices; first tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    indices = torch.arange(NUM_TOKENS)
    first = torch.where(indices < BORDER, 0, BORDER)
    states = [random(NUM_TOKENS, heads, 64) for heads in (4, 2, 2)]
    own = [random(NUM_TOKENS, 3, 2, 64) for _ in range(2)]
    # Outputs whose mean is far from zero have large row sums, which nearly cancel in the slopes.
    states[2], own[1] = states[2] + 4, own[1] + 4
    return [*states, *own], random(NUM_TOKENS, 4, 64), indices, first


def gradients(dtype: torch.dtype, seed: int) -> list[Tensor]:
    states, slope, indices, first = inputs(seed)
    leaves = [state.to(dtype).requires_grad_() for state in states]
    found = packed_ttt_attention(*leaves, indices, first)
    return [grad.double() for grad in torch.autograd.grad(found, leaves, slope.to(dtype))]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [
        float((one - other).norm() / other.norm())
        for one, other in zip(found, expected, strict=True)
    ]


def rounded_products(grad_output: Tensor, attention_output: Tensor) -> Tensor:
    """Return the row sums of products that were rounded first."""
    return (grad_output * attention_output).float().sum(dim=-1, keepdim=True)


def test_products_of_row_sums_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(200, 64, generator=generator).bfloat16() for _ in range(2))
    exact = (left.double() * right.double()).sum(dim=-1, keepdim=True)

    def error(row_sums: Callable[[Tensor, Tensor], Tensor]) -> float:
        return float((row_sums(left, right).double() - exact).norm() / exact.norm())

    assert error(attention._row_sums) < 1e-6
    assert error(rounded_products) > 1e-4


def test_exact_row_sums_make_gradients_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries and keys, which the row sums reach; those of values do not depend on them."""
    totals = {"exact": 0.0, "rounded": 0.0}
    for seed in range(4):
        expected = gradients(torch.float64, seed)
        exact = errors(gradients(torch.bfloat16, seed), expected)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_row_sums", rounded_products)
            rounded = errors(gradients(torch.bfloat16, seed), expected)
        assert exact[2] == rounded[2]
        assert max(exact) < 0.1
        totals["exact"] += exact[0] + exact[1]
        totals["rounded"] += rounded[0] + rounded[1]
    assert totals["exact"] < totals["rounded"]
