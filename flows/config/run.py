"""The sections of a recipe that a run is made with."""

from dataclasses import dataclass

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from eagle_core.tracking.config import TrackingConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What `train` and `online` are asked to do, handed on as one value."""

    target: TargetConfig
    dataset: DatasetConfig
    store: StoreConfig
    training: TrainingConfig
    tracking: TrackingConfig

    def title(self, run: str) -> str:
        """Return the name of a run among those of all targets and data sets."""
        return f"{self.target.name}-{self.dataset.name}-{run}"
