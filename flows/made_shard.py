"""What is known of a shard because a run made it; the store knows the rest."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeShard:
    """A shard that one task run committed."""

    shard_id: str
    seconds: float
    attempt: int
    made_by: str
    """Host and process that wrote it."""
