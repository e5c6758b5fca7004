"""What may limit the choice of the next token. The limits mean what they mean in transformers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingLimits:
    """Which tokens may be chosen; the defaults limit nothing."""

    top_p: float = 1.0
    """Only the most likely tokens whose probabilities add up to this."""
    top_k: int | None = None
    """Only so many of the most likely tokens; None means all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that are in the prompt or in the text so far."""


NO_LIMITS = SamplingLimits()
