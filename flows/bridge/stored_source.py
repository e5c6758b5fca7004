"""Conversion between store and trainer: stored samples as a `SampleSource`, and back."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eagle_core.samples import HiddenStateSample
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from flows.bridge.recompute import completed, require_partial
from storage.reader import SnapshotReader
from storage.samples import StoredSample


class StoredSource:
    """The samples of one snapshot, in snapshot order, with all their states.

    States that the store omits are recomputed when a sample is fetched, which the loader does ahead
    of the trainer, in its own thread.
    """

    def __init__(self, reader: SnapshotReader, recompute_model: RecomputeModel | None) -> None:
        """Read through `reader`; `recompute_model` comes from `flows.bridge.recompute`."""
        self._reader = reader
        self._recompute_model = recompute_model
        if reader.identity.omitted is not None:
            require_partial(recompute_model)

    @property
    def source_id(self) -> str:
        """The snapshot id."""
        return self._reader.snapshot_id

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each sample."""
        return self._reader.lengths

    @property
    def groups(self) -> NDArray[np.int64]:
        """[N] shard of each sample."""
        return self._reader.groups

    def origin(self, sample_id: str) -> str:
        """Return the name of a sample's shard."""
        return f"shard {self._reader.shard_of(sample_id)}"

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
        """Start reading the shards of these samples; of others' too if processes share them."""
        self._reader.prefetch(indices, others)

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index` with its bytes verified."""
        stored = self._reader.fetch(index)
        if self._reader.identity.omitted is not None:
            stored = completed(stored, require_partial(self._recompute_model))
        return HiddenStateSample(
            sample_id=stored.sample_id,
            input_ids=stored.input_ids,
            loss_mask=stored.loss_mask,
            aux_hidden_states=stored.aux_hidden_states,
            last_hidden_state=stored.last_hidden_state,
            target_argmax=stored.target_argmax,
            target_logsumexp=stored.target_logsumexp,
        )


def to_stored(sample: HiddenStateSample) -> StoredSample:
    """Return `sample` in the store's type; the arrays are shared, not copied."""
    return StoredSample(
        sample_id=sample.sample_id,
        input_ids=sample.input_ids,
        loss_mask=sample.loss_mask,
        aux_hidden_states=sample.aux_hidden_states,
        last_hidden_state=sample.last_hidden_state,
        target_argmax=sample.target_argmax,
        target_logsumexp=sample.target_logsumexp,
    )
