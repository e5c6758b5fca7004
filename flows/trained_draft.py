"""Which checkpoint of a run to use, and the draft with its weights.

A checkpoint is never loaded into a draft of another shape: the fields that differ are named.
"""

from pathlib import Path

from eagle_core import checkpoint
from eagle_core.checkpoint import Checkpoint, CheckpointChoice
from eagle_core.errors import ConfigError
from flows.draft_setup import DraftSetup


def choose_checkpoint(run_path: Path, choice: CheckpointChoice) -> Path:
    """Return the folder of a run's best checkpoint, or of its newest; ConfigError without any.

    A run that was never measured on held-out data has no best one: its newest stands in.
    """
    best = checkpoint.best(run_path) if choice == "best" else None
    chosen = best or checkpoint.newest(run_path)
    if chosen is None:
        raise ConfigError(f"{run_path} has no checkpoint yet; run the train flow first")
    return chosen


def load_checkpoint(setup: DraftSetup, folder: Path) -> Checkpoint:
    """Give the draft of `setup` the weights of a checkpoint, and return its record.

    Raises:
        MismatchError: the run's draft has another shape than the settings give.

    """
    found = checkpoint.read(folder)
    checkpoint.require_identity(
        folder,
        {"draft": found.identity["draft"]},
        {"draft": setup.draft.config.model_dump(mode="json")},
    )
    checkpoint.load_weights(setup.draft, folder)
    return found
