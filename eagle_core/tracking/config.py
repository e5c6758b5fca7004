"""Where the metrics of a training run are recorded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from eagle_core.config_model import ConfigModel

TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow"]
"""Each is a module of this package with a function `open_tracker`."""


PACKAGES: Mapping[TrackerName, str] = {
    "wandb": "wandb",
    "swanlab": "swanlab",
    "mlflow": "mlflow-skinny",
}
"""The pip package of each tracker that is not installed with Eyas."""


class TrackingConfig(ConfigModel):
    """Where the metrics of a training run are recorded."""

    trackers: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="Any of tensorboard, wandb, swanlab and mlflow; may be empty.",
    )
    project: str = Field(
        default="eyas", min_length=1, description="Project (MLflow: experiment) of the run."
    )
    mode: Literal["offline", "online"] = Field(
        default="offline",
        description="offline: write files below the home folder, to sync or open later; online: "
        "send to the service, with the credentials that its package finds (WANDB_API_KEY or `wandb "
        "login`, SWANLAB_API_KEY or `swanlab login`, MLFLOW_TRACKING_URI).",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """A training run whose metrics are recorded."""

    name: str
    path: Path
    """Folder of the run. MLflow's offline store is next to it, so that runs can be compared."""
    settings: Mapping[str, JsonValue]
    """Settings of the run."""
