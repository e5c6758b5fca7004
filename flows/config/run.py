"""The sections of a recipe that define a run."""

from dataclasses import dataclass

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.target.config import TargetConfig
from eagle_core.tracking.config import TrackingConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The settings of `train` and `online`, passed on as one value."""

    target: TargetConfig
    dataset: DatasetConfig
    store: StoreConfig
    training: TrainingConfig
    tracking: TrackingConfig
    draft: DraftSettings = PLAIN_DRAFT
    given_target: TargetConfig | None = None
    """As the recipe has it, where `target` has decided what that leaves open."""

    def title(self, run: str) -> str:
        """Return the name of a run, unique among all targets and data sets."""
        return f"{self.target.name}-{self.dataset.name}-{run}"
