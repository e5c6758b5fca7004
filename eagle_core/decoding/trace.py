"""What decoding one text took: the rounds of verification, and the time."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationRound:
    """What one target forward over a drafted chain gave."""

    verified: int
    """Drafted tokens with a known verdict: K, or fewer where a stop token ended the text."""
    accepted: int
    """Of these, the accepted ones."""
    gained: int
    """Tokens of the text: accepted + 1, or accepted where the stop token was itself drafted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationTrace:
    """One generated text and what it took."""

    tokens: tuple[int, ...]
    """The new tokens, a stop token included."""
    rounds: tuple[VerificationRound, ...] = ()
    """One for each verifying forward; empty when decoded plainly. The last one counts in full even
    where `max_new_tokens` cut its tokens, so that short texts do not look worse than long ones."""
    seconds: float
    """Wall time, prefill included; of texts decoded side by side, an equal share of it."""
    prefill_seconds: float
    """Of it, until the first token."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """Drafted tokens accepted in each round, 0..K."""
        return tuple(verification.accepted for verification in self.rounds)
