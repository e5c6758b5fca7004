"""The semantic probe: what the target model itself said at a few positions of a shard.

Taken from the model's real output during generation, kept in the commit record, and recomputed from
the stored bytes later: states of the wrong layer, norm or sample cannot reproduce it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePoint:
    """The target's own prediction after one token."""

    sample_id: str
    position: int
    """Index t of the token whose last hidden state predicts token t + 1."""
    argmax: int
    """Argmax of the target's logits at t over its full vocabulary."""
    logprob: float
    """Log-probability (nats) the target gave to `argmax` at t."""
