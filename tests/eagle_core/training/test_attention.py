"""The attention of the training-time test in bfloat16, and what a sliding window costs."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from eagle_core.training import attention
from eagle_core.training.attention import BLOCK_QUERIES, packed_ttt_attention

NUM_TOKENS, BORDER = 96, 40
WINDOW = 100


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


@pytest.mark.parametrize("num_own", [0, 3, 150])
def test_no_block_of_a_windowed_sequence_sees_more_than_block_and_window(
    num_own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even behind a long prompt without queries, and where the last queries are far apart."""
    num_keys: list[int] = []
    scores_of = attention._scores_of

    def watched(left: torch.Tensor, shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        num_keys.append(shared.shape[1] + own.shape[2])
        return scores_of(left, shared, own)

    monkeypatch.setattr(attention, "_scores_of", watched)
    indices = torch.cat([torch.arange(5000, 7000), torch.arange(7000, 20000, 1000)])
    query = torch.randn(len(indices), 2, 4, requires_grad=True)
    keys, values = (torch.randn(20000, 1, 4, requires_grad=True) for _ in range(2))
    own_keys, own_values = (torch.randn(len(indices), num_own, 1, 4) for _ in range(2))
    first = torch.zeros_like(indices)
    output = packed_ttt_attention(query, keys, values, own_keys, own_values, indices, first, WINDOW)
    output.sum().backward()
    assert max(num_keys) <= BLOCK_QUERIES + WINDOW
    assert len(num_keys) <= 2 * (20000 // BLOCK_QUERIES)  # forward and backward
    seen = values.grad.abs().sum(dim=(1, 2)) > 0
    oldest = 5000 - (WINDOW - 1 - num_own)
    expected = torch.zeros(20000, dtype=torch.bool)
    for index in indices.tolist() if num_own < WINDOW else []:
        expected[index - (WINDOW - 1 - num_own) : index + 1] = True
    assert torch.equal(seen, expected)
    assert num_own >= WINDOW or int(seen.nonzero()[0]) == oldest
