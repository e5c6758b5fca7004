"""The target's ends where a store leaves states out: what is kept goes in, samples come out.

Holds the one place that knows both rooms: which states are left out is the store's knowledge, how
the target makes them again is that of `RecomputeModel`.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.target.config import TargetConfig
from eagle_core.target.head import log_probabilities
from eagle_core.target.recompute_model import RecomputeModel, StoredStates
from storage.errors import ConfigError
from storage.records.identity import StoreIdentity
from storage.samples import StoredSample


def load_recompute_model(target: TargetConfig, identity: StoreIdentity) -> RecomputeModel | None:
    """Return the ends of the target if a store leaves states out, else None and load nothing."""
    return None if identity.omitted is None else RecomputeModel.load(target)


def completed(sample: StoredSample, partial: RecomputeModel) -> StoredSample:
    """Return a sample with the states that its store left out, made from those it kept.

    `last_hidden_state` is zero where the store would not have kept it: the sample is the one that a
    store without recomputation gives.
    """
    kept = StoredStates(input_ids=sample.input_ids, late=sample.aux_hidden_states[:, -1])
    derived = partial.recompute(kept)
    tokens, num_kept, hidden = sample.aux_hidden_states.shape
    aux = np.empty((tokens, num_kept + 1, hidden), np.uint16)
    aux[:, 0] = derived.early
    aux[:, 1:] = sample.aux_hidden_states
    last = derived.last
    if sample.last_present is not None:
        last[~sample.last_present] = 0
    return replace(sample, aux_hidden_states=aux, last_hidden_state=last)


class TargetRecompute:
    """`storage.recompute.Recompute` with the target's head and, where needed, its ends."""

    def __init__(self, lm_head: Tensor, partial: RecomputeModel | None) -> None:
        """Read states with `lm_head` [V, H]; `partial` is None if the store leaves none out."""
        self._lm_head = lm_head
        self._partial = partial

    def log_probabilities(
        self, last: NDArray[np.uint16], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Return [K] nats for `token_ids` [K] after last states [K, H] (bfloat16 bits)."""
        return log_probabilities(self._lm_head, last, token_ids)

    def complete(self, sample: StoredSample) -> StoredSample:
        """Return a sample with all its states; ConfigError if the target's ends are not at hand."""
        if len(sample.last_hidden_state) == len(sample):
            return sample
        return completed(sample, require_partial(self._partial))


def require_partial(partial: RecomputeModel | None) -> RecomputeModel:
    """Return what a store that leaves states out is read with; ConfigError if it was not loaded."""
    if partial is None:
        raise ConfigError(
            "the store leaves states out, and the target that makes them again is not at hand: "
            "read it through a recipe's flow, which loads it"
        )
    return partial
