"""The trace of decoding one text: its verification rounds and its time."""

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
