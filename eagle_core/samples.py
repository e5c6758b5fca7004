"""Data passed between the stages: tokens, hidden states, and the protocol that serves them.

Shapes: T tokens, A aux layers (3), H target hidden size. bfloat16 is passed as its bit pattern
in uint16, because NumPy has no bfloat16; `eagle_core.bfloat16` converts it to and from torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np
import xxhash
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedSample:
    """One conversation after the chat template."""

    sample_id: str
    """`sample_id(input_ids, loss_mask)`: content-addressed, 32 hex digits."""
    input_ids: NDArray[np.int32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T], True where the token is the assistant's (end-of-turn token included)."""
    location: str = field(default="", compare=False)
    """Source file and record of the conversation; empty if not recorded."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStateSample:
    """One conversation with all outputs of the target model that training needs."""

    sample_id: str
    input_ids: NDArray[np.int32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]"""
    aux_hidden_states: NDArray[np.uint16]
    """[T, A, H] bfloat16 bits: outputs of the aux layers, low to high."""
    last_hidden_state: NDArray[np.uint16]
    """[T, H] bfloat16 bits, after the final norm: `lm_head(last)` gives the target's logits."""
    target_argmax: NDArray[np.int32]
    """[T] argmax of the target's logits over the full vocabulary."""
    target_logsumexp: NDArray[np.float32]
    """[T] log of the sum of exponentials of the target's logits over the full vocabulary."""
    argmax_logprob: NDArray[np.float32] | None = None
    """[T] log-probability (nats) of `target_argmax`; None on a sample read from a store."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    def part(self, start: int, end: int) -> Self:
        """Return the tokens from `start` to before `end`; the memory is shared."""
        if (start, end) == (0, len(self)):
            return self
        logprob = self.argmax_logprob
        return replace(
            self,
            input_ids=self.input_ids[start:end],
            loss_mask=self.loss_mask[start:end],
            aux_hidden_states=self.aux_hidden_states[start:end],
            last_hidden_state=self.last_hidden_state[start:end],
            target_argmax=self.target_argmax[start:end],
            target_logsumexp=self.target_logsumexp[start:end],
            argmax_logprob=None if logprob is None else logprob[start:end],
        )


class SampleSource(Protocol):
    """Random access to hidden-state samples, whether stored or computed on the fly.

    `source_id` names the content (a snapshot id offline, a data and target digest online): loader
    states and checkpoints carry it, and training refuses to resume with another one.
    """

    @property
    def source_id(self) -> str:
        """Digest of the content and its order."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] number of tokens per sample, known without reading any state."""

    @property
    def groups(self) -> NDArray[np.int64]:
        """[N] non-decreasing group (shard) of each sample; reading one group at once is cheap."""

    def origin(self, sample_id: str) -> str:
        """Return the origin of a sample for an error message: its shard, or the target."""

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
        """Start reading these samples in the background, if the source can.

        Args:
            indices: samples that this rank will fetch.
            others: those that other ranks will fetch. Ranks that share what they read divide the
                work; without sharing, a source passes over them.

        """

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index`; raise instead of substituting anything."""


def sample_id(input_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> str:
    """Return the content address of a sample: xxh3_128 of ids (int32 LE) and mask (uint8)."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(loss_mask, dtype="u1").tobytes())
    return digest.hexdigest()
