"""What the flows themselves need to know; stages bring their own configuration."""

from pydantic import ByteSize, Field

from eagle_core.config_model import ConfigModel
from storage.profiles import DEFAULT_PROFILE, PROFILES, ProfileName


class StoreConfig(ConfigModel):
    """Where hidden states go, and in which portions they are made."""

    root: str | None = Field(
        default=None,
        description="Root of the store; by default stores/TARGET-DATASET below the home folder.",
    )
    credentials: str | None = Field(
        default=None,
        description="Name of a Prefect Secret block with the AWS variables of a store on S3. Empty "
        "means the usual variables and files where the flow runs.",
    )
    profile: ProfileName = Field(
        default=DEFAULT_PROFILE,
        description="How states are encoded. "
        + " ".join(f"{name}: {profile.summary}." for name, profile in PROFILES.items()),
    )
    recompute: bool = Field(
        default=False,
        description="Store half of the states: the early and the last ones are made again while "
        "training reads, by the target's first and last layers, bit for bit on one machine.",
    )
    keep: bool = Field(
        default=False,
        description="The online flow alone: write the states into the store as they are computed, "
        "so that its second epoch and every later run read them.",
    )
    shard_tokens: int = Field(
        default=16384,
        gt=0,
        description="Tokens of one shard; a kill costs two at most. Training keeps "
        "training.shuffle_window shards in memory, about 8 bytes a token and hidden channel.",
    )
    shards_per_task: int = Field(
        default=16,
        gt=0,
        description="Shards that one child process makes with one loading of the target; choose it "
        "for 50 to 300 tasks a run and at least 10 s each.",
    )
    max_excluded_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the samples, rounded up, that may be left out because the target "
        "gives them states that are not finite; more stop the run.",
    )
    cache_bytes: ByteSize = Field(
        default=ByteSize(50 * 10**9),
        description="Most bytes of a store on S3 that training keeps on the local disk, such as "
        "200GB; at least a window of shards, else every epoch fetches all of them again.",
    )
    budget: ByteSize | None = Field(
        default=None,
        description="Most bytes that the store may take, such as 2TB; nothing is made that would "
        "exceed it. Empty means the free space alone decides.",
    )
