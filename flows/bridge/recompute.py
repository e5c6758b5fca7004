"""Recomputes the states that a store omits, with the target's first and last layers.

The only place that knows both sides: the store decides which states it omits, and `RecomputeModel`
how the target recomputes them.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.target.config import TargetConfig
from eagle_core.target.head import log_probabilities
from eagle_core.target.layerwise.recompute_model import RecomputeModel, StoredStates
from storage.errors import ConfigError
from storage.records.identity import StoreIdentity
from storage.samples import StoredSample


def load_recompute_model(target: TargetConfig, identity: StoreIdentity) -> RecomputeModel | None:
    """Load the target's first and last layers if a store omits states, else return None."""
    return None if identity.omitted is None else RecomputeModel.load(target)


def completed(sample: StoredSample, recompute_model: RecomputeModel) -> StoredSample:
    """Return a sample with its omitted states, recomputed from the stored ones.

    `last_hidden_state` is zero where a store would not have kept it: the sample equals the one from
    a store without recompute.
    """
    stored = StoredStates(input_ids=sample.input_ids, late=sample.aux_hidden_states[:, -1])
    recomputed = recompute_model.recompute(stored)
    tokens, num_kept, hidden = sample.aux_hidden_states.shape
    aux = np.empty((tokens, num_kept + 1, hidden), np.uint16)
    aux[:, 0] = recomputed.early
    aux[:, 1:] = sample.aux_hidden_states
    last = recomputed.last
    if sample.last_present is not None:
        last[~sample.last_present] = 0
    return replace(sample, aux_hidden_states=aux, last_hidden_state=last)


class TargetRecompute:
    """`storage.recompute.Recompute` with the target's head and, if needed, its layers."""

    def __init__(self, lm_head: Tensor, recompute_model: RecomputeModel | None) -> None:
        """Use `lm_head` [V, H]; `recompute_model` is None if the store omits no states."""
        self._lm_head = lm_head
        self._recompute_model = recompute_model

    def log_probabilities(
        self, last: NDArray[np.uint16], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Return [K] nats of `token_ids` [K], given the last states [K, H] (bfloat16 bits)."""
        return log_probabilities(self._lm_head, last, token_ids)

    def complete(self, sample: StoredSample) -> StoredSample:
        """Return a sample with all its states; ConfigError if the target is not loaded."""
        if len(sample.last_hidden_state) == len(sample):
            return sample
        return completed(sample, require_partial(self._recompute_model))


def require_partial(recompute_model: RecomputeModel | None) -> RecomputeModel:
    """Return the model that recomputes omitted states; ConfigError if it was not loaded."""
    if recompute_model is None:
        raise ConfigError(
            "the store omits states, and the target that recomputes them is not loaded: read the "
            "store through a recipe's flow, which loads it"
        )
    return recompute_model
