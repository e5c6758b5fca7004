"""The interface of a target for speculative decoding, and its cache of several texts.

Shapes: B batch, T tokens, S entries of a cache, H target hidden, V target vocabulary.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle_core.errors import ConfigError
from eagle_core.target.model import cannot_roll_back

_RECORD_PAST = "activate_past_recording"
_IS_CROPPABLE = "is_croppable"
"""False before the first token: only then a layer has a recurrent state, or none."""


class CroppableCache(Protocol):
    """A key-value cache that can drop its newest tokens (transformers' `DynamicCache`)."""

    def crop(self, tokens_to_remove: int, /) -> None:
        """Drop `-tokens_to_remove` tokens; the argument is a negative number or 0."""

    def batch_select_indices(self, indices: Tensor, /) -> None:
        """Keep only the sequences at `indices`."""


CacheT = TypeVar("CacheT", bound=CroppableCache)


class CachedTarget(Protocol[CacheT]):
    """The interface of a target model for speculative decoding; `TargetModel` implements it."""

    device: torch.device

    @property
    def decodes_batches(self) -> bool:
        """Whether texts of different lengths can share a cache."""

    def forward_cached(
        self,
        input_ids: Tensor,
        past: CacheT | None,
        /,
        *,
        valid_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, CacheT]:
        """Run ids [B, T] after `past`; return (last [B, T, H], aux [B, T, 3H], extended cache).

        `valid_mask` [B, S + T] is False for entries that no token may see, `positions` [B, T] are
        the tokens' positions in their texts; without both, all texts have the same length.
        """

    def require_tree(self, num_tokens: int, /) -> None:
        """Raise ConfigError if the target cannot verify trees, `num_tokens` with the text."""

    def forward_tree(
        self, input_ids: Tensor, past: CacheT, /, *, visible: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, CacheT]:
        """Run ids [1, T] of a tree after `past`; return as `forward_cached` does.

        `visible` [T, T] says which of these tokens each one sees, `positions` [1, T] where in its
        text each is.
        """

    def keep_entries(self, past: CacheT, kept: Sequence[int], /, *, num_new: int) -> None:
        """Keep only the entries `kept`, ascending, of the newest `num_new`."""

    def logits(self, last: Tensor, /) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""


class TargetCache(Generic[CacheT]):
    """The target's cache of a batch, with a mask of the entries that are tokens of their texts."""

    def __init__(self, target: CachedTarget[CacheT]) -> None:
        self._target = target
        self._past: CacheT | None = None
        self._valid_mask = torch.ones(0, 0, dtype=torch.bool, device=target.device)
        self._lengths = torch.zeros(0, dtype=torch.int64, device=target.device)

    def run(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Append tokens to every text; return right-padded (last [B, T, H], aux [B, T, 3H])."""
        device = self._target.device
        input_ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        counts = torch.tensor([len(row) for row in ids], device=device)
        if self._past is None:
            # No token sees what follows it: padding at the end needs no mask.
            self._valid_mask = torch.ones(len(ids), 0, dtype=torch.bool, device=device)
            self._lengths = torch.zeros_like(counts)
        steps = torch.arange(input_ids.shape[1], device=device)
        valid_mask = torch.cat([self._valid_mask, steps < counts.unsqueeze(1)], dim=1)
        if self._past is None or valid_mask.all():
            last, aux, self._past = self._target.forward_cached(input_ids, self._past)
        else:
            positions = self._lengths.unsqueeze(1) + steps
            last, aux, self._past = self._target.forward_cached(
                input_ids, self._past, valid_mask=valid_mask, positions=positions
            )
        if hasattr(self._past, _RECORD_PAST):  # else a full sliding window could not be cropped
            getattr(self._past, _RECORD_PAST)()
        self._valid_mask, self._lengths = valid_mask, self._lengths + counts
        return last, aux

    def require_croppable(self) -> None:
        """Raise ConfigError if the cache, which holds tokens, cannot drop the newest ones."""
        if not getattr(self._past, _IS_CROPPABLE, True):
            raise ConfigError(cannot_roll_back("this target"))

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the newest `counts` tokens of the texts."""
        assert self._past is not None  # noqa: S101 (`run` was called)
        common = min(counts)
        self._past.crop(-common)
        self._valid_mask = self._valid_mask[:, : self._valid_mask.shape[1] - common]
        dropped = torch.tensor(counts, device=self._target.device)
        from_end = torch.arange(self._valid_mask.shape[1], 0, -1, device=self._target.device)
        self._valid_mask = self._valid_mask & (from_end > (dropped - common).unsqueeze(1))
        self._lengths = self._lengths - dropped

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the texts at `rows`."""
        assert self._past is not None  # noqa: S101 (`run` was called)
        kept = torch.tensor(rows, device=self._target.device)
        self._past.batch_select_indices(kept)
        self._valid_mask, self._lengths = self._valid_mask[kept], self._lengths[kept]
