"""The results of `verify`, `repair` and `hidden-states`."""

from dataclasses import dataclass

from storage.records.exclusions import Exclusion
from storage.records.presence import Finding

SIZES = "presence and size of every object"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifySummary:
    """The state of a store."""

    store_root: str
    what: str
    """What was checked, in words."""
    num_shards: int
    findings: tuple[Finding, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairSummary:
    """The damage, the shards that were recomputed, and the remaining damage."""

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
    """The planned id unless samples were excluded; empty if all of them were."""
    excluded: tuple[Exclusion, ...]
    seconds: float
    attempt: int
    worker: str
    """Host and process that wrote it."""
