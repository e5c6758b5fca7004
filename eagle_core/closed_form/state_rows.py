"""The captured states of the positions where step 0 is judged, and the features of a regression.

At index t the draft knows the aux states of token t and the embedding of token t + 1, and predicts
the target's final state after token t + 1. The position counts if token t + 2, which that state
predicts, is supervised.

Shapes: R rows, L captured layers, H target hidden size, K features of one layer, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from eagle_core.bfloat16 import from_bfloat16_bits, widened
from eagle_core.samples import HiddenStateSample

CHUNK_ROWS = 1024
MOST_FEATURES = 768
"""Features of one layer; the sums over ten layers take 0.6 GB then."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StateRows:
    """The rows of some conversations."""

    aux: Tensor
    """[R, L, H] bfloat16"""
    next_ids: Tensor
    """[R] int64: token t + 1"""
    final: Tensor
    """[R, H] bfloat16: the final state after token t + 1"""
    argmax: Tensor
    """[R] int64: what the target predicts from it"""
    conversation: Tensor
    """[R] int64: number of the conversation"""

    @classmethod
    def of(cls, samples: Iterable[HiddenStateSample]) -> "StateRows | None":
        """Return the rows of `samples`, which are read once; None if there is none."""
        parts = [_rows(sample, number) for number, sample in enumerate(samples)]
        parts = [part for part in parts if len(part)]
        if not parts:
            return None
        return cls(
            aux=torch.cat([part.aux for part in parts]),
            next_ids=torch.cat([part.next_ids for part in parts]),
            final=torch.cat([part.final for part in parts]),
            argmax=torch.cat([part.argmax for part in parts]),
            conversation=torch.cat([part.conversation for part in parts]),
        )

    def __len__(self) -> int:
        """Return R."""
        return len(self.argmax)

    @property
    def num_conversations(self) -> int:
        """Return how many conversations have rows."""
        return int((self.conversation.bincount() > 0).sum())

    def chunks(self, device: torch.device) -> Iterator["StateRows"]:
        """Yield the rows in their order, some at a time, on `device`."""
        for first in range(0, len(self), CHUNK_ROWS):
            part = slice(first, first + CHUNK_ROWS)
            yield StateRows(
                aux=self.aux[part].to(device),
                next_ids=self.next_ids[part].to(device),
                final=self.final[part].to(device),
                argmax=self.argmax[part].to(device),
                conversation=self.conversation[part].to(device),
            )


def counted_positions(loss_mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the indices t of a sample where the token t + 2 is supervised."""
    indices: NDArray[np.int64] = np.flatnonzero(loss_mask[2:])
    return indices


def _rows(sample: HiddenStateSample, number: int) -> StateRows:
    at = counted_positions(sample.loss_mask)
    return StateRows(
        aux=from_bfloat16_bits(sample.aux_hidden_states[at], dtype=torch.bfloat16),
        next_ids=torch.from_numpy(sample.input_ids[at + 1].astype(np.int64)),
        final=from_bfloat16_bits(sample.last_hidden_state[at + 1], dtype=torch.bfloat16),
        argmax=torch.from_numpy(sample.target_argmax[at + 1].astype(np.int64)),
        conversation=torch.full((len(at),), number),
    )


class FeatureMap:
    """Turns rows into the features of all layers and of the embedding, block by block.

    Up to `most` channels are features as they are. Of wider states the principal directions of
    their channels, each divided by its root mean square, take their place.
    """

    def __init__(
        self, rows: StateRows, embedding: Tensor, device: torch.device, *, most: int = MOST_FEATURES
    ) -> None:
        """Find the directions from `rows`; `embedding` is [V, H]. Chunks must be on `device`."""
        self._embedding = embedding.to(device)
        self.width = min(embedding.shape[1], most)
        """K"""
        num_layers = rows.aux.shape[1]
        self._maps: Sequence[Tensor | None] = [None] * (num_layers + 1)
        if embedding.shape[1] > most:
            self._maps = [
                _principal_directions(rows, self._block, block, most, device)
                for block in range(num_layers + 1)
            ]

    @property
    def num_features(self) -> int:
        """Return (L + 1) * K."""
        return len(self._maps) * self.width

    def __call__(self, rows: StateRows) -> Tensor:
        """Return [R, (L + 1) * K] float32: the layers in their order, then the embedding."""
        blocks = []
        for block, directions in enumerate(self._maps):
            states = self._block(rows, block)
            blocks.append(states if directions is None else states @ directions)
        return torch.cat(blocks, dim=1)

    def columns(self, places: Iterable[int]) -> Tensor:
        """Return the columns of the layers at `places`, and those of the embedding."""
        blocks = (*places, len(self._maps) - 1)
        own = torch.arange(self.width, device=self._embedding.device)
        return torch.cat([own + block * self.width for block in blocks])

    def _block(self, rows: StateRows, block: int) -> Tensor:
        """Return [R, H] the states of a layer, or the normed embedding."""
        if block < rows.aux.shape[1]:
            return widened(rows.aux[:, block])
        embedded = self._embedding[rows.next_ids]
        return functional.rms_norm(widened(embedded), embedded.shape[-1:])


def _principal_directions(
    rows: StateRows,
    block_of: Callable[[StateRows, int], Tensor],
    block: int,
    count: int,
    device: torch.device,
) -> Tensor:
    """Return [H, count] the map of a block's states to their principal directions."""
    hidden_size = rows.aux.shape[-1]
    gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)
    for chunk in rows.chunks(device):
        states = block_of(chunk, block)
        gram += states.T @ states
    sizes = (gram.diagonal() / len(rows)).sqrt()
    scale = torch.where(sizes > 0, 1 / sizes.clamp(min=1e-30), 0.0)
    _, directions = torch.linalg.eigh(scale[:, None] * gram * scale)
    found: Tensor = (scale[:, None] * directions[:, -count:]).float()
    return found
