"""Where shards are made: in child processes here, or on the workers of a cluster."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from eagle_core.config_model import ConfigModel


class RunnerConfig(ConfigModel):
    """How many processes make shards at once, and what starts them."""

    former_keys: ClassVar[Mapping[str, str]] = {"silence_seconds": "inactivity_timeout_seconds"}

    kind: Literal["processes", "dask", "ray"] = Field(
        default="processes",
        description="Child processes on this machine, each with a GPU of its own, or the workers "
        "of a Dask or Ray cluster (pip install 'eyas[dask]' or 'eyas[ray]').",
    )
    num_workers: int = Field(
        default=1,
        gt=0,
        description="Processes that make shards at the same time, each with the target loaded. A "
        "cluster with an address decides by itself.",
    )
    inactivity_timeout_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="A process that has finished no sample for so long is taken for hung: it is "
        "killed, and its batch tried again. The first sample includes loading the target.",
    )
    address: str | None = Field(
        default=None,
        description="A Dask or Ray cluster that is running, such as tcp://HOST:8786 or "
        "ray://HOST:10001. Empty starts one on this machine for the time of the run.",
    )
