"""The trace of decoding one text: its verification rounds and its time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationRound:
    """Result of one target forward over a drafted chain."""

    verified: int
    """Drafted tokens with a known verdict: K, or fewer where a stop token ended the text."""
    accepted: int
    """Number of these that were accepted."""
    gained: int
    """Tokens added to the text: accepted + 1, or accepted if the stop token itself was drafted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationTrace:
    """One generated text with its rounds and time."""

    tokens: tuple[int, ...]
    """The new tokens, a stop token included."""
    rounds: tuple[VerificationRound, ...] = ()
    """One per verifying forward; empty when decoded plainly. The last one counts in full even
    where `max_new_tokens` cut its tokens, so that short texts do not look worse than long ones."""
    seconds: float
    """Wall time, prefill included; for texts of one batch, an equal share of the batch's time."""
    prefill_seconds: float
    """Part of `seconds` until the first token."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """Drafted tokens accepted in each round, 0..K."""
        return tuple(verification.accepted for verification in self.rounds)


def kept_round(
    chunk: Sequence[int], *, accepted: int, drafted: int, stop_ids: Collection[int]
) -> tuple[Sequence[int], VerificationRound]:
    """Return what a text keeps of a round, up to a stop token, and the round as it counts.

    Args:
        chunk: the accepted tokens and the target's own; tokens after a stop token may be missing.
        accepted: drafted tokens that the target accepted, those after a stop token included.
        drafted: K, tokens of the chain.
        stop_ids: token ids that end a text.

    """
    kept = until_stop(chunk, stop_ids)
    num_accepted = min(accepted, len(kept))
    ended_early = kept[-1] in stop_ids and len(kept) <= accepted
    return kept, VerificationRound(
        verified=num_accepted if ended_early else drafted,
        accepted=num_accepted,
        gained=len(kept),
    )


def until_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> Sequence[int]:
    """Return `tokens` up to and including the first stop token."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens
