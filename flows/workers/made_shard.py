"""What is known of a shard because a run made it; the store knows the rest."""

from dataclasses import dataclass

from storage.records.exclusions import Exclusion


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeShard:
    """A shard that one task run committed."""

    planned_id: str
    shard_id: str
    """That of the plan unless samples were left out; empty if all of them were."""
    excluded: tuple[Exclusion, ...]
    seconds: float
    attempt: int
    made_by: str
    """Host and process that wrote it."""
