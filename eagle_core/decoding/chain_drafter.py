"""Chain drafting: the EAGLE-3 recurrence run forward, with the draft's own key-value cache.

Entry t of the draft's cache reads the embedding of token t+1 and the fused aux states of token t,
has rotary position t and predicts token t+2. Invariant: entries that are kept come only from the
target's aux states; entries that a chain appended from its own hidden states are cropped before the
next ones from the target are written. The sequences of a batch may have any lengths: each has its
own positions, and padding is hidden.

Shapes: B batch, T tokens, H draft hidden, Ht target hidden, D draft vocabulary, V target
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from eagle_core.decoding.verification import sample_token
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.errors import ConfigError


class DraftNetwork(Protocol):
    """The interface of a draft model for drafting; `DraftModel` implements it."""

    d2t: Tensor
    """[D] target id minus draft id."""
    t2d: Tensor
    """[V] whether the draft vocabulary contains the token."""
    fc: nn.Linear
    """Fuses the aux states; its dtype is the draft's."""

    def fuse(self, aux: Tensor, /) -> Tensor:
        """Return the fused state [..., H] of aux states [..., 3Ht]."""

    def decode(
        self, input_ids: Tensor, hidden: Tensor, positions: Tensor, cache: DraftCache, /
    ) -> Tensor:
        """Return the pre-norm states [B, T, H] of ids [B, T] and states [B, T, H] after `cache`."""

    def recurrent(self, hidden: Tensor, /) -> Tensor:
        """Return the states that the next drafted token reads, from pre-norm states [..., H]."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Return the draft's logits [..., D] for pre-norm states [..., H]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A drafted chain."""

    tokens: tuple[int, ...]
    """[K] target-vocabulary ids."""
    probabilities: Tensor | None
    """[K, V] distribution of each token; None when drafted greedily."""


class ChainDrafter:
    """Drafts chains for a batch of sequences: `observe` the target's states, then `propose`."""

    def __init__(
        self,
        draft: DraftNetwork,
        *,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """Sample with one generator per sequence; none is needed at temperature 0."""
        if temperature > 0 and not generators:
            raise ConfigError("drafting at a temperature above 0 needs one generator per sequence")
        self._draft = draft
        self._cache = DraftCache()
        self._temperature = temperature
        self._generators = list(generators)
        self._num_entries = 0
        self._hidden: Tensor | None = None
        self.lengths: Tensor | None = None
        """[B] number of entries from the target's states per sequence; None before the first."""

    def observe(self, next_ids: Sequence[Sequence[int]], aux: Sequence[Tensor]) -> None:
        """Append entries to each of B sequences: `aux` [T, 3Ht] of T tokens and, for each token,
        the id of the next one. T may differ from sequence to sequence.

        Replaces the entries that the last chain appended from its own hidden states.
        """
        device = aux[0].device
        self._cache.crop(self._num_entries)
        counts = torch.tensor([len(ids) for ids in next_ids], device=device)
        ids = pad_sequence([torch.tensor(row, device=device) for row in next_ids], batch_first=True)
        fused = self._draft.fuse(pad_sequence(list(aux), batch_first=True).to(self._dtype))
        start = torch.zeros_like(counts) if self.lengths is None else self.lengths
        hidden = self._decode(ids, fused, start)
        valid_mask = torch.arange(ids.shape[1], device=device) < counts.unsqueeze(1)
        if not valid_mask.all():
            self._cache.hide(valid_mask)
        rows = torch.arange(len(counts), device=device)
        self._hidden = hidden[rows, counts - 1].unsqueeze(1)
        self.lengths = start + counts
        self._num_entries += ids.shape[1]

    def propose(self, num_tokens: int) -> list[Proposal]:
        """Draft a chain of `num_tokens` after the last observed token of each sequence."""
        if self._hidden is None or self.lengths is None:
            raise ConfigError("a drafter must observe the prompt before it can propose")
        hidden = self._hidden
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        for step in range(num_tokens):
            if step:
                hidden = self._draft.recurrent(hidden)
                hidden = self._decode(tokens[-1], hidden, self.lengths + step - 1)
            logits = self._draft.logits(hidden)[:, 0]
            if self._temperature == 0:
                drafted = logits.argmax(dim=-1)
            else:
                draft_probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
                drafted = self._sample(draft_probabilities)
                probabilities.append(self._in_target_vocabulary(draft_probabilities))
            tokens.append((drafted + self._draft.d2t[drafted]).unsqueeze(1))
        chains = torch.cat(tokens, dim=1).tolist()
        per_chain = torch.stack(probabilities, dim=1) if probabilities else [None] * len(chains)
        return [
            Proposal(tokens=tuple(chain), probabilities=distributions)
            for chain, distributions in zip(chains, per_chain, strict=True)
        ]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the sequences at `rows`, in that order."""
        if self._generators:
            self._generators = [self._generators[row] for row in rows]
        if self.lengths is None or len(rows) == len(self.lengths):
            return
        kept = torch.tensor(rows, device=self.lengths.device)
        self._cache.select(kept)
        self.lengths = self.lengths[kept]

    @property
    def _dtype(self) -> torch.dtype:
        weight: Tensor = self._draft.fc.weight
        return weight.dtype

    def _decode(self, ids: Tensor, hidden: Tensor, start: Tensor) -> Tensor:
        """Run ids [B, T] and states [B, T, H] at positions from `start` [B] on."""
        positions = start.unsqueeze(1) + torch.arange(ids.shape[1], device=ids.device)
        return self._draft.decode(ids, hidden, positions, self._cache)

    def _sample(self, probabilities: Tensor) -> Tensor:
        """Return [B] draft ids drawn from [B, D], each with its sequence's own generator."""
        drawn = map(sample_token, probabilities, self._generators)
        return torch.tensor(list(drawn), device=probabilities.device)

    def _in_target_vocabulary(self, probabilities: Tensor) -> Tensor:
        """Scatter [B, D] draft probabilities to [B, V]; ids outside the draft vocabulary get 0."""
        count, size = probabilities.shape
        target_ids = torch.arange(size, device=probabilities.device) + self._draft.d2t
        scattered = probabilities.new_zeros(count, len(self._draft.t2d))
        return scattered.index_copy_(1, target_ids, probabilities)
