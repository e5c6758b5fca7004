"""Which positions of a sample training takes, if not all, and what each stands for.

The choice depends on the seed, the epoch and the sample alone: not on batches, windows, processes,
or where a run was interrupted.

Shapes: T tokens of a sample.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from eagle_core.training.config import LossPositions, TttConfig
from eagle_core.training.positions import supervised_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionDraws:
    """The settings that decide how many positions are drawn, and from which."""

    limit: int
    """Most positions of a sample."""
    ttt_length: int
    positions: LossPositions

    @classmethod
    def of(cls, options: TttConfig) -> Self | None:
        """Return those of a run; None if all positions are taken."""
        if options.max_positions_per_sample is None:
            return None
        return cls(
            limit=options.max_positions_per_sample,
            ttt_length=options.ttt_length,
            positions=options.loss_positions,
        )

    def weights(
        self, sample_id: str, loss_mask: NDArray[np.bool_], *, seed: int, epoch: int
    ) -> NDArray[np.float32]:
        """Return [T] the factor of each position of a sample in the loss; 0 where none is computed.

        Of n positions that are supervised in any step, k are taken, each as likely as any other.
        The loss at one depends on no other that is taken, so with the factor n / k its expected
        gradient is that of all.
        """
        text = f"{seed} {epoch} {sample_id}"
        own_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        order = np.random.default_rng(own_seed).permutation(len(loss_mask))
        pool = self._pool(loss_mask)
        taken = pool[np.argsort(order[pool])[: self.limit]]
        weights = np.zeros(len(loss_mask), dtype=np.float32)
        weights[taken] = len(pool) / max(1, len(taken))
        return weights

    def _pool(self, loss_mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the positions where a step is supervised, ascending."""
        supervised = supervised_steps(
            torch.from_numpy(np.array(loss_mask)),
            (0, len(loss_mask)),
            ttt_length=self.ttt_length,
            positions=self.positions,
        )
        found: NDArray[np.int64] = np.flatnonzero(supervised.any(dim=0).numpy())
        return found
