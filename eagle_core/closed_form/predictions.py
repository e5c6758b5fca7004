"""What the linear fit of a draft sees at each training-time-test step, and what it should predict.

At index t of step k the draft knows the aux states of token t and the embeddings of tokens up to
t+1+k. It should predict the target's final state after token t+1+k.

Shapes: N packed tokens, A_k indices of step k, R_k rows of step k where a loss counts, H draft
hidden, Ht target hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_core.bfloat16 import widened
from eagle_core.closed_form.state_sizes import StateSizes
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.packing import PackedBatch
from eagle_core.training.ttt import batch_positions


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """Inputs and targets of one batch."""

    indices: tuple[Tensor, ...]
    """Per step [A_k]: where the step computes; each contains the next."""
    is_counted: tuple[Tensor, ...]
    """Per step [A_k] bool: where its loss counts."""
    aux: Tensor
    """[N, 3Ht] as `fc` reads them"""
    embedding: Tensor
    """[N, H] as the layer reads them"""
    final: Tensor
    """[N, H] the target's final states without the gain of the norm: mean square 1"""

    @classmethod
    @torch.no_grad()
    def of(
        cls, draft: DraftModel, batch: PackedBatch, sizes: StateSizes, options: TttConfig
    ) -> "Predictions":
        """Return those of `batch`, which is on the draft's device."""
        positions = batch_positions(draft.t2d, batch, options)
        return cls(
            indices=positions.indices,
            is_counted=tuple(
                positions.counted[step, indices] for step, indices in enumerate(positions.indices)
            ),
            aux=draft.fusing_inputs(widened(batch.aux_hidden_states)),
            embedding=draft.midlayer.input_layernorm(draft.embed_tokens(batch.input_ids)),
            final=widened(batch.last_hidden_state) / sizes.final_gain,
        )

    def embeddings(self, step: int) -> Tensor:
        """Return [A_k, H] the embeddings of the tokens that the step adds."""
        return self.embedding[self.indices[step] + 1 + step]

    def finals(self, step: int) -> Tensor:
        """Return [A_k, H] the states that the step should predict."""
        return self.final[self.indices[step] + 1 + step]

    def kept(self, step: int) -> Tensor:
        """Return [A_k] where the indices of step k > 0 are among those of the step before."""
        return torch.searchsorted(self.indices[step - 1], self.indices[step])
