"""The target model as a store needs it: to predict from states, and to recompute omitted states.

Storage imports no model: flows pass in an implementation of this protocol.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from storage.samples import StoredSample


class Recompute(Protocol):
    """The target model, or the part of it that these two methods need."""

    def log_probabilities(
        self, last: NDArray[np.uint16], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Return [K] nats of `token_ids` [K], predicted from last states [K, H] (bfloat16 bits)."""

    def complete(self, sample: StoredSample) -> StoredSample:
        """Return a stored sample with omitted states recomputed; unchanged if it has them all."""
