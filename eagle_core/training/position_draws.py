"""A random order of the positions of each sample: which ones training takes, if not all.

It depends on the seed, the epoch and the sample alone: not on batches, processes, or where a run
was interrupted.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eagle_core.samples import HiddenStateSample


def position_draws(samples: Sequence[HiddenStateSample], *, seed: int, epoch: int) -> Tensor:
    """Return [N] int64 for N tokens of all samples: of each, a random permutation of 0..length."""
    orders = []
    for sample in samples:
        text = f"{seed} {epoch} {sample.sample_id}"
        own_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        orders.append(np.random.default_rng(own_seed).permutation(len(sample)))
    return torch.from_numpy(np.concatenate(orders).astype(np.int64))
