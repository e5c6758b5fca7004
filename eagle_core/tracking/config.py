"""Where the figures of a training go."""

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
"""What pip installs for a tracker that does not come with Eyas."""


class TrackingConfig(ConfigModel):
    """Where the figures of a training go."""

    trackers: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="Any of tensorboard, wandb, swanlab and mlflow; none keeps no curves.",
    )
    project: str = Field(
        default="eyas", min_length=1, description="Project (MLflow: experiment) of the run."
    )
    mode: Literal["offline", "online"] = Field(
        default="offline",
        description="offline: files below the home folder, to sync or open later; online: the "
        "service, with the credentials that its package finds (WANDB_API_KEY or `wandb login`, "
        "SWANLAB_API_KEY or `swanlab login`, MLFLOW_TRACKING_URI).",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """The training whose figures are kept."""

    name: str
    path: Path
    """Its folder. MLflow's offline store lies beside it, so that runs can be compared."""
    settings: Mapping[str, JsonValue]
    """What it was made with."""
