"""The verdict on a chain of drafted tokens: how many are accepted, and which token follows them.

Pure functions of logits and probabilities. Invariant: the resulting tokens have exactly the
distribution that the target alone would have produced. Greedy verification follows the
target's argmax; sampled verification is the rejection scheme of Leviathan et al. (2023, algorithm
1) and Chen et al. (2023): keep a drafted token with probability min(1, p/q), else draw from the
part of p above q.

Shapes: K drafted tokens, V target vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The decision of one target forward about a drafted chain."""

    accepted: int
    """Number of accepted tokens, 0..K: always a prefix of the chain."""
    next_token: int
    """The target's own token after them."""


def verify_greedy(drafted: Sequence[int], target_logits: Tensor) -> Verdict:
    """Accept the longest prefix that equals the argmax of `target_logits` [K+1, V].

    Row i holds the logits after i drafted tokens. A token outside the draft vocabulary can never be
    drafted, so it is a miss like any other.
    """
    choices: list[int] = target_logits.argmax(dim=-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == choices[accepted]:
        accepted += 1
    return Verdict(accepted=accepted, next_token=choices[accepted])


def verify_sampled(
    drafted: Sequence[int],
    draft_probabilities: Tensor,
    target_probabilities: Tensor,
    generator: torch.Generator,
) -> Verdict:
    """Accept drafted tokens so that the outcome follows `target_probabilities`.

    `draft_probabilities` [K, V] are the distributions of the drafted tokens; row i of
    `target_probabilities` [K+1, V] is the target's distribution after i drafted tokens.
    """
    coins = torch.rand(len(drafted), generator=generator, dtype=torch.float64).tolist()
    for index, (token, coin) in enumerate(zip(drafted, coins, strict=True)):
        target = target_probabilities[index]
        draft = draft_probabilities[index]
        if coin * draft[token].item() >= target[token].item():
            return Verdict(
                accepted=index, next_token=sample_token(residual(target, draft), generator)
            )
    return Verdict(
        accepted=len(drafted), next_token=sample_token(target_probabilities[-1], generator)
    )


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """Return the normalised part of `target` [V] that lies above `draft` [V]."""
    above = (target - draft).clamp_min(0)
    total = above.sum()
    # Equal distributions are rejected only through rounding; then the target's own is right.
    return above / total if total > 0 else target


def sample_token(probabilities: Tensor, generator: torch.Generator) -> int:
    """Draw one token id from `probabilities` [V]."""
    # Draw on the CPU: with one generator, a seed gives the same text on every device.
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator).item())
