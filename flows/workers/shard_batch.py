"""The requests and reports between tasks and the processes that compute shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from eagle_core.target.config import TargetConfig
from eagle_core.target.memory.free_memory import ALONE, MemoryShare
from storage.records.exclusions import Exclusion
from storage.records.plan import PlannedShard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """The shards of a plan that have no commit record."""

    plan_id: str
    shards: tuple[PlannedShard, ...]


class ShardBatch(BaseModel):
    """The shards of one task run: the request to a child process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    store_root: str
    plan_id: str
    shard_ids: tuple[str, ...]
    token_files: tuple[Path, ...]
    first: int = 0
    """Position of the first shard in the plan, for a readable name."""
    last: int = 0
    inactivity_timeout_seconds: float = 1800.0
    """A process that reports nothing for this long is killed."""
    memory: MemoryShare = ALONE
    """What the process may take."""
    credentials: str | None = None
    """The block with the store's credentials, for a task on another machine."""


class ShardReport(BaseModel):
    """One line from a child."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tokens", "shard"]
    tokens: int = 0
    """How many more are done."""
    planned_id: str = ""
    shard_id: str = ""
    """As written, without excluded samples; empty if no sample is left."""
    excluded: tuple[Exclusion, ...] = ()
    """Samples of the shard whose states cannot be stored."""
    seconds: float = 0.0
    """From the first token of a shard to its commit."""
    worker: str = ""
    """Host and process."""
