"""What tasks and the processes that compute shards tell each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from eagle_core.target.config import TargetConfig
from storage.records.exclusions import Exclusion
from storage.records.plan import PlannedShard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """The shards of a plan that have no commit record."""

    plan_id: str
    shards: tuple[PlannedShard, ...]


class ShardBatch(BaseModel):
    """The shards of one task run: what a child process is asked to compute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    store_root: str
    plan_id: str
    shard_ids: tuple[str, ...]
    token_files: tuple[Path, ...]
    first: int = 0
    """Place of the first shard in the plan, for a name that a person can read."""
    last: int = 0
    inactivity_timeout_seconds: float = 1800.0
    """A process that reports nothing for so long is killed."""
    credentials: str | None = None
    """The block that opens the store, where a task runs on another machine."""


class ShardReport(BaseModel):
    """One line of the answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tokens", "shard"]
    tokens: int = 0
    planned_id: str = ""
    shard_id: str = ""
    """As it was written: without excluded samples. Empty if none is left."""
    excluded: tuple[Exclusion, ...] = ()
    """Samples of the shard whose states cannot be stored."""
    seconds: float = 0.0
    """From the first token of a shard to its commit."""
    made_by: str = ""
    """Host and process."""
