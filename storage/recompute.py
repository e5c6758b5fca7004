"""What a target at hand can do for a store: read states, and make those that were left out.

Storage knows no model: flows hand in something that follows this protocol.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from storage.samples import StoredSample


class Recompute(Protocol):
    """The target, or as much of it as the two questions take."""

    def log_probabilities(
        self, last: NDArray[np.uint16], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Return [K] nats for `token_ids` [K] after last states [K, H] (bfloat16 bits)."""

    def complete(self, sample: StoredSample) -> StoredSample:
        """Return a sample as its store keeps it with all its states, or as it is if it has them."""
