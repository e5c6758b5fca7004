"""What the `export` flow takes from a run, and in which form it is written."""

from pydantic import Field

from eagle_core.draft.export_config import ExportConfig
from eagle_core.training.config import CheckpointChoice


class RunExportConfig(ExportConfig):
    """How the draft of a run is exported."""

    checkpoint: CheckpointChoice = Field(
        default="best",
        description="best: the checkpoint with the longest held-out acceptance (training.best_by), "
        "or the newest if nothing was held out.",
    )
