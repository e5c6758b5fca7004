"""What `verify` and `repair` found and did, and what `hidden-states` made."""

from dataclasses import dataclass

from storage.records.exclusions import Exclusion
from storage.records.presence import Finding

SIZES = "presence and size of every object"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifySummary:
    """The state of a store."""

    store_root: str
    what: str
    """What was looked at, in words."""
    num_shards: int
    findings: tuple[Finding, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairSummary:
    """What was damaged, what was made again, and what is damaged still."""

    store_root: str
    num_shards: int
    findings: tuple[Finding, ...]
    remade: tuple[str, ...]
    """Shard ids."""
    left: tuple[Finding, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """A shard that one task run committed."""

    planned_id: str
    shard_id: str
    """That of the plan unless samples were left out; empty if all of them were."""
    excluded: tuple[Exclusion, ...]
    seconds: float
    attempt: int
    made_by: str
    """Host and process that wrote it."""
