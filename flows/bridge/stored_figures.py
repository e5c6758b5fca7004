"""What stored states say about a run: a few samples of both splits, with its trained draft."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eagle_core.diagnosis.data_quality import Choices
from eagle_core.diagnosis.learning import Accuracies
from eagle_core.samples import HiddenStateSample, SampleSource
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from eagle_core.training.pieces import Windows, piece_batches
from eagle_core.training.precision import multiplying_dtype
from eagle_core.training.validation import HeldOutFigures, measure, measuring_step
from flows.bridge.draft_setup import DraftSetup
from flows.bridge.first_weights import as_begun
from flows.bridge.recompute import TargetRecompute, load_recompute_model
from flows.bridge.run import Run
from flows.bridge.semantic_probe import require_sound
from flows.bridge.stored_source import StoredSource
from storage.errors import CorruptError, ShardCorruptError, StorageError
from storage.records.snapshot import Snapshot
from storage.store import Store

_TOKENS = 8_192
"""Of each split."""
_SHARDS = 4
"""Of each split: reading one is what takes time."""
_NONE_HELD_OUT = "no samples were held out"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredFigures:
    """Figures from stored states. A text is the reason why one is unknown."""

    aux_layers: tuple[int, ...] | None
    """That the store names; None without a store."""
    fault: str | None
    """Of the semantic probe; empty if it holds, None if it was not checked."""
    training_choices: Choices | str
    held_out_choices: Choices | str
    accuracies: Accuracies | str
    why_unknown: str = ""
    shortest: HiddenStateSample | None = None
    """A sample to compare with the target's own states."""

    @classmethod
    def unknown(
        cls, why: str, *, aux_layers: tuple[int, ...] | None = None, fault: str | None = None
    ) -> "StoredFigures":
        """Return no figures, for one reason."""
        return cls(
            aux_layers=aux_layers,
            fault=fault,
            training_choices=why,
            held_out_choices=why,
            accuracies=why,
            why_unknown=why,
        )


def stored_figures(
    root: str, run: Run, target: TargetConfig, setup: DraftSetup, held_out: TokenFile | None
) -> StoredFigures:
    """Read some samples of the store at `root`, and measure the trained draft of `setup` on them.

    What cannot be read is named in the figures, not raised: a run may be examined without it.
    """
    try:
        store = Store.open(root)
    except StorageError as error:
        return StoredFigures.unknown(str(error))
    layers = store.identity.aux_layers
    recompute_model = load_recompute_model(target, store.identity)
    try:
        snapshot = store.snapshot(run.source_id)
        store.require_present(snapshot)
        require_sound(store, snapshot, TargetRecompute(setup.target_lm_head, recompute_model))
        source = StoredSource(store.reader(snapshot), recompute_model)
        training = _some(source)
        kept = _kept_out(store, held_out)
        new = None if kept is None else _some(StoredSource(store.reader(kept), recompute_model))
    except (CorruptError, ShardCorruptError) as error:
        return StoredFigures.unknown(
            "the stored states are damaged", aux_layers=layers, fault=str(error)
        )
    except StorageError as error:
        return StoredFigures.unknown(str(error), aux_layers=layers)
    t2d = setup.draft.t2d.cpu().numpy()
    return StoredFigures(
        aux_layers=layers,
        fault="",
        training_choices=Choices.count(training, t2d),
        held_out_choices=_NONE_HELD_OUT if new is None else Choices.count(new, t2d),
        accuracies=_NONE_HELD_OUT if new is None else _accuracies(setup, run, training, new),
        shortest=min(training, key=len),
    )


def _kept_out(store: Store, held_out: TokenFile | None) -> Snapshot | None:
    if held_out is None:
        return None
    commits = store.commits()
    there = commits.held(commits.usable(held_out.sample_ids))
    return Snapshot.of(there, commits) if there else None


def _some(source: SampleSource) -> list[HiddenStateSample]:
    """Return the first samples of a few groups, which are spread over the source."""
    groups = np.unique(source.groups)
    chosen = groups[np.linspace(0, len(groups) - 1, min(_SHARDS, len(groups))).astype(int)]
    samples = []
    for group in chosen:
        rows = np.flatnonzero(source.groups == group)
        ends = np.cumsum(source.lengths[rows])
        wanted = rows[: int(np.searchsorted(ends, _TOKENS // len(chosen))) + 1]
        samples += [source.fetch(index) for index in wanted.tolist()]
    return samples


def _accuracies(
    setup: DraftSetup,
    run: Run,
    training: Sequence[HiddenStateSample],
    held_out: Sequence[HiddenStateSample],
) -> Accuracies:
    settings = as_begun(run.training, setup.run_path)
    on_training = _measured(setup, settings, training)
    on_held_out = _measured(setup, settings, held_out)
    return Accuracies(
        training=on_training.accuracies[0],
        held_out=on_held_out.accuracies[0],
        held_out_length=on_held_out.length,
        held_out_prefixes=on_held_out.joint_prefix_accuracies,
    )


def _measured(
    setup: DraftSetup, training: TrainingConfig, samples: Sequence[HiddenStateSample]
) -> HeldOutFigures:
    dtype: torch.dtype = multiplying_dtype(training.dtype, setup.draft.fc.weight.device)
    return measure(
        measuring_step(setup.draft, training, dtype),
        piece_batches(samples, Windows.of(training, setup.draft.config)),
        setup.draft.draft_rows(setup.target_lm_head, dtype),
    )
