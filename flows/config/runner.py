"""Where shards are computed: in child processes here, or on the workers of a cluster."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from eagle_core.config_model import ConfigModel


class RunnerConfig(ConfigModel):
    """How many processes compute shards in parallel, and what starts them."""

    former_keys: ClassVar[Mapping[str, str]] = {"silence_seconds": "inactivity_timeout_seconds"}

    kind: Literal["processes", "dask", "ray"] = Field(
        default="processes",
        description="Child processes on this machine, each with its own GPU, or the workers "
        "of a Dask or Ray cluster (in the repository: pip install -e '.[dask]' or '.[ray]').",
    )
    num_workers: int = Field(
        default=1,
        gt=0,
        description="Processes that compute shards in parallel, each with the target loaded. A "
        "cluster with an address uses its own number.",
    )
    inactivity_timeout_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="A process that finishes no sample, or batch in a streamed layer, for this "
        "long is considered hung: it is killed, and its batch is retried. The first one includes "
        "loading the target.",
    )
    address: str | None = Field(
        default=None,
        description="A running Dask or Ray cluster, such as tcp://HOST:8786 or ray://HOST:10001. "
        "If empty, one is started on this machine for the run.",
    )
