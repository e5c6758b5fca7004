"""Settings of the store of hidden states."""

from pydantic import ByteSize, Field

from eagle_core.config_model import ConfigModel
from storage.profiles import DEFAULT_PROFILE, PROFILES, ProfileName


class StoreConfig(ConfigModel):
    """Where hidden states are stored, and in which portions they are computed."""

    root: str | None = Field(
        default=None,
        description="Root of the store; by default stores/TARGET-DATASET below the home folder.",
    )
    credentials: str | None = Field(
        default=None,
        description="Name of a Prefect Secret block with the AWS variables of a store on S3. If "
        "empty, the usual variables and files on the machine of the flow are used.",
    )
    profile: ProfileName = Field(
        default=DEFAULT_PROFILE,
        description="How states are encoded. "
        + " ".join(f"{name}: {profile.summary}." for name, profile in PROFILES.items()),
    )
    recompute: bool = Field(
        default=False,
        description="Store half of the states: training recomputes the early and the last ones "
        "with the target's first and last layers, bit-exactly on the same machine.",
    )
    keep: bool = Field(
        default=False,
        description="Online flow only: write the states into the store as they are computed, so "
        "that the second epoch and every later run read them.",
    )
    shard_tokens: int = Field(
        default=16384,
        gt=0,
        description="Tokens per shard; a kill loses at most two shards. Training keeps "
        "training.shuffle_window shards in memory, about 8 bytes per token and hidden channel.",
    )
    shards_per_task: int = Field(
        default=16,
        gt=0,
        description="Shards that a child process computes per task; choose it for 50 to 300 tasks "
        "per run of at least 10 s each.",
    )
    max_excluded_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest share of the samples, rounded up, that may be excluded because their "
        "states are not finite; more stop the run.",
    )
    cache_bytes: ByteSize = Field(
        default=ByteSize(50 * 10**9),
        description="Size limit of the local disk cache for a store on S3, such as 200GB; at least "
        "a window of shards, else every epoch fetches all shards again.",
    )
    budget: ByteSize | None = Field(
        default=None,
        description="Size limit of the store, such as 2TB; no shard is computed that would exceed "
        "it. If empty, only the free space limits the store.",
    )
