"""Verdicts on drafted chains: exact when greedy, unbiased when sampled."""

import pytest
import torch

from eagle_core.decoding.verification import (
    Verdict,
    residual,
    sample_token,
    verify_greedy,
    verify_sampled,
)


def test_the_longest_prefix_equal_to_the_argmax_stands() -> None:
    logits = torch.eye(6)[[3, 1, 4, 0]]
    assert verify_greedy([3, 1, 4], logits) == Verdict(accepted=3, next_token=0)
    assert verify_greedy([3, 2, 4], logits) == Verdict(accepted=1, next_token=1)
    assert verify_greedy([5, 1, 4], logits) == Verdict(accepted=0, next_token=3)


def test_sampled_pairs_follow_the_target_whatever_the_draft_prefers() -> None:
    """Chi-square over all pairs of the first two tokens; the draft cannot even say token 5."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, num_draws = 6, 12000
    target = torch.softmax(2 * torch.randn(1 + vocab_size, vocab_size, generator=generator), -1)
    draft = torch.softmax(2 * torch.randn(1 + vocab_size, vocab_size, generator=generator), -1)
    draft[:, 5] = 0
    draft /= draft.sum(dim=-1, keepdim=True)
    target, draft = target.double(), draft.double()
    # Row 0 is the first token's distribution, row 1 + a the second's behind token a.
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    for _ in range(num_draws):
        first = sample_token(draft[0], generator)
        second = sample_token(draft[1 + first], generator)
        drafted = torch.stack([draft[0], draft[1 + first]])
        wanted = torch.stack([target[0], target[1 + first], target[1 + second]])
        verdict = verify_sampled([first, second], drafted, wanted, generator)
        text = [*[first, second][: verdict.accepted], verdict.next_token]
        if len(text) == 1:  # rejected at once: the next round starts behind the target's token
            text.append(sample_token(target[1 + text[0]], generator))
        counts[text[0], text[1]] += 1
    expected = num_draws * target[0].unsqueeze(1) * target[1:]
    common = expected >= 5
    statistic = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum()) - 1
    assert degrees > 15
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.softmax(torch.randn(3, 9, generator=generator), dim=-1).double()
    for _ in range(200):
        drafted = [sample_token(row, generator) for row in probabilities[:2]]
        verdict = verify_sampled(drafted, probabilities[:2], probabilities, generator)
        assert verdict.accepted == 2


def test_the_residual_is_what_the_draft_undervalues() -> None:
    found = residual(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.2, 0.7]))
    assert found.tolist() == pytest.approx([0.8, 0.2, 0.0])
    same = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(same, same), same)
