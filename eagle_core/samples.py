"""What flows between the stages: tokens, hidden states, and the protocol that serves them.

Shapes: T tokens, A aux layers (3), H target hidden size. bfloat16 travels as its bit pattern in
uint16, because NumPy has no bfloat16; `eagle_core.bfloat16` turns it into torch tensors and back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

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
    """File and record of the conversation; empty where that was not written down."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStateSample:
    """One conversation with everything the target model knows about it that training needs."""

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
    """[T] log-probability (nats) of `target_argmax`; None on a sample that comes from a store."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)


class SampleSource(Protocol):
    """Random access to hidden-state samples, whether stored or computed on the fly.

    `source_id` names the content (a snapshot id offline, a data and target digest online): loader
    states and checkpoints carry it, and training refuses to go on with another one.
    """

    @property
    def source_id(self) -> str:
        """Digest of the content and its order."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each sample, known without reading any state."""

    @property
    def groups(self) -> NDArray[np.int64]:
        """[N] non-decreasing group (shard) of each sample; one group is cheap to read at once."""

    def origin(self, sample_id: str) -> str:
        """Return where a sample comes from, for an error message: its shard, or the target."""

    def prefetch(self, indices: Iterable[int]) -> None:
        """Begin to read what these samples need, if that can be done beside other work."""

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index`; raise rather than substitute anything."""


def sample_id(input_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> str:
    """Return the content address of a sample: xxh3_128 of ids (int32 LE) and mask (uint8)."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(loss_mask, dtype="u1").tobytes())
    return digest.hexdigest()
