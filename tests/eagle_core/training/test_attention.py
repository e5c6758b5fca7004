"""What attention over a sliding window costs: blocks that see no more keys than the window has."""

import pytest
import torch

from eagle_core.training import attention
from eagle_core.training.attention import BLOCK_QUERIES, packed_ttt_attention

WINDOW = 100


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
