"""Log-probabilities that a target's head predicts from stored states."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits

_HEAD_CHUNK_ROWS = 16384


@torch.inference_mode()
def log_probabilities(
    lm_head: Tensor, last: NDArray[np.uint16], token_ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Return [K] log-probabilities (nats) of `token_ids` [K] after states `last` [K, H].

    Computed in float32 from the head's weight [V, H], as training reads it, one slice at a time.
    """
    states = from_bfloat16_bits(last, dtype=torch.float32).to(lm_head.device)
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(lm_head.device)
    wanted = (states * lm_head[ids].float()).sum(dim=-1)
    slices = [
        (states @ rows.float().T).logsumexp(dim=-1)
        for rows in torch.split(lm_head, _HEAD_CHUNK_ROWS)
    ]
    found: NDArray[np.float32] = (wanted - torch.stack(slices).logsumexp(dim=0)).cpu().numpy()
    return found
