"""From a row of a dump to the sample that the target itself would have given.

Refused, by reason: shapes, ids or masks that do not fit the target, and states that no healthy
model has. Padding is cut. What the dump lacks comes from the target: the norm of the last state, or
the last state itself, and the teacher's argmax and logsumexp.

Shapes: T tokens, A aux layers, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits, to_bfloat16_bits
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.dumps.agreement import difference
from eagle_core.dumps.dump import DumpedStates
from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample, TokenizedSample, sample_id
from eagle_core.target.capture import teacher
from eagle_core.target.final_head import FinalHead
from eagle_core.target.layerwise.recompute_model import (
    RecomputedStates,
    RecomputeModel,
    StoredStates,
)

MaskSource = Literal["dump", "template", "all"]
LastState = Literal["auto", "normed", "unnormed"]
_FEWEST_PADDING = 2
"""One such token may be text."""
OnChange = Callable[[Change, str], None]
"""Called with a change and its detail."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetShape:
    """What the rows have to fit."""

    aux_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    padding_ids: frozenset[int]
    """Ids that do nothing but pad."""
    stop_ids: frozenset[int]
    """Ids that end an answer; rows may be padded with them, too."""
    first_id: int | None
    """The token that every conversation begins with; None if there is no such token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is taken of a row; as in the data set's settings."""

    max_length: int
    min_supervised_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """Completes the rows of one dump for one target."""

    shape: TargetShape
    limits: Limits
    end: FinalHead
    mask: MaskSource
    template_mask: Callable[[NDArray[np.int32]], NDArray[np.bool_]]
    """Returns the mask of ids by the chat template; raises `RejectedRecord`."""
    last_state: LastState = "auto"
    recompute_model: RecomputeModel | None = None
    """Gives the last state where the dump has none, and what to compare every row with."""
    checks_every_row: bool = False
    """Whether early and last states must be those that `recompute_model` gives."""

    @torch.inference_mode()
    def complete(
        self, found: DumpedStates, location: str, *, on_change: OnChange
    ) -> HiddenStateSample:
        """Return the sample of a row; RejectedRecord says what is wrong with it."""
        tokens = self._tokens(found, location, on_change)
        num = len(tokens)
        aux = self._states(
            found.aux, "aux states", (len(self.shape.aux_layers), self.shape.hidden_size), location
        )
        self._require_length("aux states", len(aux), found, location)
        aux_bits = _bits(_owned(aux[:num]), "aux states", location)
        last = self._last(found, tokens, aux_bits, location)
        if self.checks_every_row:
            self._require_reproduced(tokens, aux_bits, to_bfloat16_bits(last), location)
        argmax, logsumexp, logprob = teacher(self.end.logits, last)
        if not np.isfinite(logsumexp).all():
            raise RejectedRecord(Reason.BAD_STATES, location, "its logits are not finite")
        return HiddenStateSample(
            sample_id=tokens.sample_id,
            input_ids=tokens.input_ids,
            loss_mask=tokens.loss_mask,
            aux_hidden_states=aux_bits,
            last_hidden_state=to_bfloat16_bits(last),
            target_argmax=argmax,
            target_logsumexp=logsumexp,
            argmax_logprob=logprob,
        )

    # ---- tokens

    def _tokens(self, found: DumpedStates, location: str, on_change: OnChange) -> TokenizedSample:
        ids = _integers(found.input_ids, "token ids", location)
        mask = None
        if found.loss_mask is not None and self.mask == "dump":
            mask = _flags(found.loss_mask, "loss mask", len(ids), location)
        if found.lacks_first_token:
            ids, mask = self._with_first(ids, mask, location)
        num_real = self._num_real(found, ids, mask, location)
        if num_real < len(ids):
            on_change(Change.PADDING_CUT, f"{len(ids) - num_real} of {len(ids)} tokens")
        if not num_real:
            raise RejectedRecord(Reason.BAD_TOKENS, location, "it has no token but padding")
        ids, mask = ids[:num_real], None if mask is None else mask[:num_real]
        outside = (ids < 0) | (ids >= self.shape.vocab_size)
        if outside.any():
            at = int(np.argmax(outside))
            detail = f"{ids[at]} at position {at}; the target has {self.shape.vocab_size} tokens"
            raise RejectedRecord(Reason.UNKNOWN_TOKEN, location, detail)
        kept = ids.astype(np.int32)
        mask = self._mask(kept, mask, location)
        limit = self.limits.max_length
        if len(kept) > limit:
            on_change(Change.CUT_TO_MAX_LENGTH, f"{len(kept)} tokens to {limit}")
            kept, mask = kept[:limit], mask[:limit]
        num_supervised = int(mask.sum())
        if num_supervised < self.limits.min_supervised_tokens:
            detail = f"{num_supervised} in the first {len(kept)} of {len(ids)} tokens"
            raise RejectedRecord(Reason.TOO_FEW_SUPERVISED_TOKENS, location, detail)
        return TokenizedSample(
            sample_id=sample_id(kept, mask), input_ids=kept, loss_mask=mask, location=location
        )

    def _with_first(
        self, ids: NDArray[np.int64], mask: NDArray[np.bool_] | None, location: str
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Return ids and mask that were those of the next token, with the missing first one."""
        if self.shape.first_id is None:
            detail = "the first token is not stored, and the chat template begins with no fixed one"
            raise RejectedRecord(Reason.BAD_TOKENS, location, detail)
        whole = np.concatenate([[self.shape.first_id], ids[:-1]])
        return whole, None if mask is None else np.concatenate([[False], mask[:-1]])

    def _num_real(
        self,
        found: DumpedStates,
        ids: NDArray[np.int64],
        mask: NDArray[np.bool_] | None,
        location: str,
    ) -> int:
        """Return how many tokens come before the padding.

        By the attention mask if there is one. Otherwise padding is two or more equal tokens at the
        end, without supervision, of an id that pads. Without a mask, the first that ends a text is
        real.
        """
        if found.attention_mask is not None:
            attended = _flags(found.attention_mask, "attention mask", len(ids), location)
            num_real = int(attended.sum())
            if not attended[:num_real].all():
                detail = "its attention mask is not that of padding at the end"
                raise RejectedRecord(Reason.PADDED_ON_THE_LEFT, location, detail)
            return num_real
        end = int(ids[-1])
        if end not in self.shape.padding_ids | self.shape.stop_ids | {found.padding_id}:
            return len(ids)
        is_other = ids != end if mask is None else (ids != end) | mask
        behind = np.flatnonzero(is_other)
        num_real = int(behind[-1]) + 1 if len(behind) else 0
        if mask is None and end in self.shape.stop_ids:
            num_real += 1
        is_padding = len(ids) - num_real >= _FEWEST_PADDING
        return num_real if is_padding and num_real else len(ids)

    def _mask(
        self, ids: NDArray[np.int32], mask: NDArray[np.bool_] | None, location: str
    ) -> NDArray[np.bool_]:
        if self.mask == "all":
            return np.ones(len(ids), np.bool_)
        if self.mask == "template":
            try:
                return self.template_mask(ids)
            except RejectedRecord as rejected:
                raise RejectedRecord(rejected.reason, location, rejected.detail) from rejected
        if mask is None:
            detail = "the dump has no loss mask; --mask template derives it from the chat template"
            raise RejectedRecord(Reason.NO_MASK, location, detail)
        return mask

    # ---- states

    def _states(self, states: Tensor, what: str, inner: tuple[int, ...], location: str) -> Tensor:
        """Return states [T, *inner] in the shape that the target gives them."""
        if not states.is_floating_point():
            raise RejectedRecord(Reason.WRONG_SHAPE, location, f"{what} are {states.dtype}")
        while states.ndim > 2 and states.shape[0] == 1 and states.shape != (1, *inner):
            states = states[0]
        width = int(np.prod(inner))
        flat = states.shape[1:] == (width,) or states.shape[1:] == inner
        if states.ndim < 2 or not len(states) or not flat:
            layers = f"{inner[0]} layers of {inner[1]}" if len(inner) > 1 else f"{inner[0]}"
            detail = f"{what} are {list(states.shape)}, expected [tokens, {width}] ({layers})"
            raise RejectedRecord(Reason.WRONG_SHAPE, location, detail)
        return states.reshape(len(states), *inner)

    def _require_length(self, what: str, length: int, found: DumpedStates, location: str) -> None:
        expected = found.input_ids.numel()
        if length != expected:
            detail = f"{what} of {length} tokens, {expected} token ids"
            raise RejectedRecord(Reason.WRONG_SHAPE, location, detail)

    def _last(
        self,
        found: DumpedStates,
        tokens: TokenizedSample,
        aux: NDArray[np.uint16],
        location: str,
    ) -> Tensor:
        """Return the post-norm states [T, H], in bfloat16 on the device of the head."""
        device = self.end.lm_head.device
        if found.last is None:
            bits = self._recomputed(tokens, aux).last
            return from_bfloat16_bits(bits, dtype=torch.bfloat16).to(device)
        states = self._states(found.last, "last states", (self.shape.hidden_size,), location)
        self._require_length("last states", len(states), found, location)
        kept = _owned(states[: len(tokens)])
        is_normed = (
            found.last_is_normed if self.last_state == "auto" else self.last_state == "normed"
        )
        if not is_normed:
            kept = self.end.normed(kept)
        _bits(kept, "last states", location)
        return kept.to(device, torch.bfloat16)

    def _recomputed(self, tokens: TokenizedSample, aux: NDArray[np.uint16]) -> RecomputedStates:
        if self.recompute_model is None:
            raise ConfigError("the first and last layers of the target are not loaded")
        stored = StoredStates(input_ids=tokens.input_ids, late=aux[:, -1])
        return self.recompute_model.recompute(stored)

    def _require_reproduced(
        self,
        tokens: TokenizedSample,
        aux: NDArray[np.uint16],
        last: NDArray[np.uint16],
        location: str,
    ) -> None:
        """Raise RejectedRecord unless tokens, early, late and last states belong together."""
        expected = self._recomputed(tokens, aux)
        if differs := difference(aux[:, 0], expected.early):
            detail = f"its first aux state is not what the target has for its tokens ({differs})"
            raise RejectedRecord(Reason.NOT_REPRODUCED, location, detail)
        if differs := difference(last, expected.last):
            detail = f"its last state does not follow from its last aux state ({differs})"
            raise RejectedRecord(Reason.NOT_REPRODUCED, location, detail)


def _integers(values: Tensor, what: str, location: str) -> NDArray[np.int64]:
    """Return [T] whole numbers; a batch of one counts as its only row."""
    while values.ndim > 1 and values.shape[0] == 1:
        values = values[0]
    is_whole = not (values.is_floating_point() or values.is_complex())
    if values.ndim != 1 or not values.numel() or not is_whole:
        detail = f"{what} are {values.dtype} {list(values.shape)}, expected integers [tokens]"
        raise RejectedRecord(Reason.BAD_TOKENS, location, detail)
    found: NDArray[np.int64] = values.to(torch.int64).numpy()
    return found


def _flags(values: Tensor, what: str, length: int, location: str) -> NDArray[np.bool_]:
    if values.is_floating_point():
        if not ((values == 0) | (values == 1)).all():
            detail = f"{what} has other values than 0 and 1"
            raise RejectedRecord(Reason.BAD_TOKENS, location, detail)
        values = values.long()
    numbers = _integers(values, what, location)
    if len(numbers) != length:
        detail = f"{what} has {len(numbers)} entries, {length} token ids"
        raise RejectedRecord(Reason.BAD_TOKENS, location, detail)
    if not np.isin(numbers, (0, 1)).all():
        detail = f"{what} has {numbers[~np.isin(numbers, (0, 1))][0]}, not 0 or 1"
        raise RejectedRecord(Reason.BAD_TOKENS, location, detail)
    return numbers.astype(np.bool_)


def _owned(states: Tensor) -> Tensor:
    """Return states that keep no larger tensor, of which they were cut, in memory."""
    num_bytes = states.numel() * states.element_size()
    return states.clone() if states.untyped_storage().nbytes() > num_bytes else states


def _bits(states: Tensor, what: str, location: str) -> NDArray[np.uint16]:
    """Return bfloat16 patterns; RejectedRecord names the first token that is not finite."""
    rounded = states.to(torch.bfloat16)
    finite = torch.isfinite(rounded).flatten(1).all(dim=1)
    if not finite.all():
        at, count = int(torch.argmin(finite.int())), int((~finite).sum())
        detail = f"{what} are NaN or infinite at position {at} ({count} of {len(finite)} tokens)"
        raise RejectedRecord(Reason.BAD_STATES, location, detail)
    return to_bfloat16_bits(rounded)
