"""One stored sample, and the checks that keep invalid samples out of the store.

Shapes: T tokens, A aux layers, H target hidden size. bfloat16 values are uint16 bit patterns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from storage.bfloat16 import BF16_INFINITY, BLOCK_VALUES
from storage.errors import SampleRefusedError
from storage.records.identity import StoreIdentity

TTT_LENGTH = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSample:
    """One conversation with all target-model outputs that training needs."""

    sample_id: str
    """`content_id(input_ids, loss_mask)`: 32 hex digits."""
    input_ids: NDArray[np.int32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T], True for assistant tokens."""
    aux_hidden_states: NDArray[np.uint16]
    """[T, A, H] bfloat16 bits, aux layers low to high; without the first aux layer if the sample
    comes from a store that omits it."""
    last_hidden_state: NDArray[np.uint16]
    """[T, H] bfloat16 bits, after the final norm; zero where `last_present` is False. [0, H] if the
    sample comes from a store that omits it."""
    target_argmax: NDArray[np.int32]
    """[T] argmax of the target's logits over its full vocabulary."""
    target_logsumexp: NDArray[np.float32]
    """[T] logsumexp of the target's logits over its full vocabulary."""
    last_present: NDArray[np.bool_] | None = None
    """[T], True where the last hidden state is stored or recomputed; None if not yet stored."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)


def content_id(input_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> str:
    """Return the content address of a sample: xxh3_128 of ids (int32 LE) and mask (uint8)."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(loss_mask, dtype="u1").tobytes())
    return digest.hexdigest()


def last_needed(loss_mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return [T]: which last hidden states training or evaluation of supervised tokens reads.

    With up to 7 steps of training-time test, the loss of token t reads the states t + 1 to t + 7.
    The loss of a predicted token reads the state before it. State t itself is for the probe.
    """
    needed = loss_mask.copy()
    needed[:-1] |= loss_mask[1:]
    for shift in range(1, TTT_LENGTH + 1):
        needed[shift:] |= loss_mask[:-shift]
    return needed


def require_storable(sample: StoredSample, identity: StoreIdentity) -> None:
    """Raise SampleRefusedError, naming sample, array and position, unless the sample is valid.

    Refused: shapes or dtypes that do not match the identity, an id that does not match the content,
    token ids outside the vocabulary, NaN or infinity anywhere, all-zero or constant state rows.
    """
    _require_shapes(sample, identity)
    found = content_id(sample.input_ids, sample.loss_mask)
    if found != sample.sample_id:
        raise SampleRefusedError(
            f"sample {sample.sample_id}: its token ids and loss mask have the content id {found}"
        )
    _require_vocabulary(sample, "input_ids", sample.input_ids, identity.vocab_size)
    _require_vocabulary(sample, "target_argmax", sample.target_argmax, identity.vocab_size)
    finite = np.isfinite(sample.target_logsumexp)
    if not finite.all():
        raise SampleRefusedError(
            f"sample {sample.sample_id}: target_logsumexp is NaN or infinite at position "
            f"{int(np.argmin(finite))}"
        )
    names = [f"aux_hidden_states of layer {layer}" for layer in identity.aux_layers]
    _require_healthy_rows(sample, names, sample.aux_hidden_states)
    needed = last_needed(sample.loss_mask)
    if sample.last_present is not None and (needed & ~sample.last_present).any():
        absent = int(np.argmax(needed & ~sample.last_present))
        raise SampleRefusedError(
            f"sample {sample.sample_id}: last_hidden_state is absent at position {absent}, where a "
            "supervised token needs it"
        )
    last = sample.last_hidden_state[:, np.newaxis]
    _require_healthy_rows(sample, ["last_hidden_state"], last, needed=needed)


def _require_shapes(sample: StoredSample, identity: StoreIdentity) -> None:
    tokens, hidden = len(sample.input_ids), identity.hidden_size
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "input_ids": ((tokens,), "int32"),
        "loss_mask": ((tokens,), "bool"),
        "aux_hidden_states": ((tokens, len(identity.aux_layers), hidden), "uint16"),
        "last_hidden_state": ((tokens, hidden), "uint16"),
        "target_argmax": ((tokens,), "int32"),
        "target_logsumexp": ((tokens,), "float32"),
    }
    if tokens == 0:
        raise SampleRefusedError(f"sample {sample.sample_id} has no tokens")
    for name, (shape, dtype) in expected.items():
        array: NDArray[np.generic] = getattr(sample, name)
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise SampleRefusedError(
                f"sample {sample.sample_id}: {name} is {array.dtype}{list(array.shape)}, "
                f"expected {dtype}{list(shape)}"
            )


def _require_vocabulary(
    sample: StoredSample, name: str, ids: NDArray[np.int32], vocab_size: int
) -> None:
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        position = int(np.argmax(outside))
        raise SampleRefusedError(
            f"sample {sample.sample_id}: {name} is {int(ids[position])} at position {position}, "
            f"outside the target's vocabulary of {vocab_size}"
        )


def _require_healthy_rows(
    sample: StoredSample,
    names: Sequence[str],
    states: NDArray[np.uint16],
    *,
    needed: NDArray[np.bool_] | None = None,
) -> None:
    """Check rows [T, L, H] of the named layers; with `needed`, at those positions only."""
    rows = states.reshape(-1, states.shape[-1])
    not_finite = np.empty(len(rows), np.bool_)
    all_zero = np.empty(len(rows), np.bool_)
    block_rows = max(1, BLOCK_VALUES // states.shape[-1])
    for first in range(0, len(rows), block_rows):
        block = slice(first, first + block_rows)
        magnitudes = rows[block] + rows[block]  # without the sign, which is shifted out
        largest = magnitudes.max(axis=1)
        np.greater_equal(largest, BF16_INFINITY << 1, out=not_finite[block])
        np.equal(largest, 0, out=all_zero[block])
    constant = rows[:, 0] == rows[:, -1]  # also a few others by chance
    constant[constant] = (rows[constant] == rows[constant, :1]).all(axis=1)
    for bad, problem in (
        (not_finite, "holds NaN or infinity"),
        (all_zero, "is all zero"),
        (constant, "is constant"),
    ):
        by_layer = bad.reshape(states.shape[:-1]).T
        for name, refused in zip(
            names, by_layer if needed is None else by_layer & needed, strict=True
        ):
            if refused.any():
                raise SampleRefusedError(
                    f"sample {sample.sample_id}: {name} {problem} at position "
                    f"{int(np.argmax(refused))} ({int(refused.sum())} of {len(refused)} rows): the "
                    "target model or its capture is broken"
                )
