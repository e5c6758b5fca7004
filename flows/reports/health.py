"""What `verify` and `repair` found and did."""

from dataclasses import dataclass

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
