"""The target's own prediction after one token, as a commit record holds it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

NUM_CHANNELS = 8
"""Channels of an omitted state that are recorded: its first ones."""


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
    omitted: tuple[int, ...] = ()
    """bfloat16 bits of `NUM_CHANNELS` of the early aux state at t, then of the last state; empty
    if the store omits neither."""

    def to_document(self) -> dict[str, object]:
        """Return the point as the commit record holds it."""
        document = asdict(self)
        del document["omitted"]
        if self.omitted:
            document["left_out"] = list(self.omitted)
        return document

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Self:
        """Return the point that a commit record holds."""
        fields = dict(document)
        return cls(omitted=tuple(fields.pop("left_out", ())), **fields)

    def __str__(self) -> str:
        """Return a form for error messages."""
        return f"probe at position {self.position} of sample {self.sample_id}"
