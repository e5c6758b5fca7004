"""A run that has a checkpoint, for the stages after training: no data set is read for it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.config import DraftConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import Checkpoint
from eagle_core.training.config import CheckpointChoice, TrainingConfig
from flows.bridge.draft_setup import DraftSetup, set_up_draft
from flows.bridge.run import Run, own_tokens, read_run
from flows.tasks.prepare import prepare_weights, tokens_of_run
from flows.workspace import Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRun:
    """A run, the target as it is now, and the checkpoint in use."""

    path: Path
    checkpoint_path: Path
    space: Workspace
    target: TargetConfig
    dataset: DatasetConfig
    training: TrainingConfig
    content: str
    """Content digest of its token files."""
    stop_ids: Collection[int]
    """Token ids that end an answer."""

    def load_draft(self) -> tuple[DraftSetup, Checkpoint]:
        """Return the trained draft, and the record of its checkpoint."""
        setup = set_up_draft(self.target, self.training, self.path)
        return setup, self.load_weights(setup)

    def load_weights(self, setup: DraftSetup) -> Checkpoint:
        """Load the checkpoint's weights into the run's untrained draft, and return its record.

        Raises:
            MismatchError: the checkpoint's draft has another shape than the settings.

        """
        return load_checkpoint(setup, self.checkpoint_path)

    def held_out(self) -> TokenFile:
        """Return the samples that this run never trained on.

        Raises:
            ConfigError: their file is gone, and the data set has changed since.

        """
        path = self.space.token_file("held_out", self.content)
        if not path.exists():
            tokens_of_run(self.target, self.dataset, self.space, self.path.name, self.content)
        return TokenFile(path)


def open_run(
    target: TargetConfig,
    dataset: DatasetConfig,
    training: TrainingConfig,
    home: str,
    name: str,
    choice: CheckpointChoice,
    *,
    prepare: Callable[[TargetConfig], object] = prepare_weights,
) -> TrainedRun:
    """Return a run by the names of its target, its data set and itself.

    `prepare` finds the weights: by default in a task, for which there must be a Prefect API.

    Its settings are read from its folder; `target` gives the current place of the weights and their
    device. `dataset` and `training` are used only for a run of an older version that did not record
    them.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
        MismatchError: `target` differs, or has another tokenizer or template.

    """
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    path = space.run_path(name)
    folder = choose_checkpoint(path, choice)
    prepare(target)
    run = read_run(path)
    if run is not None:
        run.require_vocabulary(path)
        run.require_target(target, path)
    return TrainedRun(
        path=path,
        checkpoint_path=folder,
        space=space,
        target=target,
        dataset=dataset if run is None else run.dataset,
        training=training if run is None else run.training,
        content=own_tokens(path, run) or "",
        stop_ids=_stop_ids(run, target),
    )


def choose_checkpoint(run_path: Path, choice: CheckpointChoice) -> Path:
    """Return the folder of a run's best checkpoint, or of its newest; ConfigError without any.

    The run's `best_by` decides which is best. If nothing was measured, there is no best one: the
    newest is used.
    """
    run = read_run(run_path) if choice == "best" else None
    best_by = "joint_prefix" if run is None else run.training.best_by
    best = checkpoint.best(run_path, best_by) if choice == "best" else None
    chosen = best or checkpoint.newest(run_path)
    if chosen is None:
        raise ConfigError(f"{run_path} has no checkpoint yet; run the train flow first")
    return chosen


def load_checkpoint(setup: DraftSetup, folder: Path) -> Checkpoint:
    """Load the weights of a checkpoint into the draft of `setup`, and return its record.

    A checkpoint is never loaded into a draft of another shape: the fields that differ are named.

    Raises:
        MismatchError: the run's draft has another shape than the settings.

    """
    found = checkpoint.read(folder)
    checkpoint.require_identity(
        folder,
        {"draft": DraftConfig.of_identity(found.identity["draft"], where=folder).identity()},
        {"draft": setup.draft.config.identity()},
    )
    checkpoint.load_weights(setup.draft, folder)
    return found


def _stop_ids(run: Run | None, target: TargetConfig) -> Collection[int]:
    """Return what ends an answer; runs of earlier versions recorded fewer."""
    recorded = frozenset() if run is None else frozenset(run.stop_ids)
    return recorded | conversation_tokenizer(target).stop_ids
