"""Chain drafting: the EAGLE-3 recurrence run forward, with the draft's own key-value cache.

Entry t of the draft's cache reads the embedding of token t+1 and the fused aux states of token t,
sits at rotary position t and predicts token t+2. The invariant: entries below `length` were made
from the target's aux states alone; whatever a chain appended from its own hidden states is cropped
before the next true entries are written.

Shapes: B batch (1), T tokens, H draft hidden, Ht target hidden, D draft vocabulary, V target
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from eagle_core.draft import DraftCache
from eagle_core.errors import ConfigError
from eagle_core.verification import sample_token


class DraftNetwork(Protocol):
    """What drafting asks of a draft model; `DraftModel` is one."""

    d2t: Tensor
    """[D] target id minus draft id."""
    t2d: Tensor
    """[V] whether the draft vocabulary has the token."""
    fc: nn.Linear
    """Fuses the aux states; its dtype is the draft's."""

    def fuse(self, aux: Tensor, /) -> Tensor:
        """Return the fused state [..., H] of aux states [..., 3Ht]."""

    def decode(
        self, input_ids: Tensor, hidden: Tensor, positions: Tensor, cache: DraftCache, /
    ) -> Tensor:
        """Return the pre-norm state [B, T, H] of ids [B, T] and states [B, T, H] behind `cache`."""

    def recurrent(self, hidden: Tensor, /) -> Tensor:
        """Return what the next drafted token reads of pre-norm states [..., H]."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Return the draft's logits [..., D] for pre-norm states [..., H]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A drafted chain."""

    tokens: tuple[int, ...]
    """[K] target-vocabulary ids."""
    probabilities: Tensor | None
    """[K, V] what each token was drawn from; None when drafted greedily."""


class ChainDrafter:
    """Drafts for one sequence; feed it the target's states, ask it for chains."""

    def __init__(
        self,
        draft: DraftNetwork,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if temperature > 0 and generator is None:
            raise ConfigError("drafting at a temperature above 0 needs a generator")
        self._draft = draft
        self._cache = DraftCache()
        self._temperature = temperature
        self._generator = generator
        self._hidden: Tensor | None = None
        self.length = 0
        """Entries made from the target's states."""

    def observe(self, next_ids: Sequence[int], aux: Tensor) -> None:
        """Append true entries: `aux` [T, 3Ht] of T tokens and, for each, the id of the token after
        it.

        Replaces what the last chain appended from its own hidden states.
        """
        self._cache.crop(self.length)
        fused = self._draft.fuse(aux.to(self._dtype)).unsqueeze(0)
        self._hidden = self._decode(next_ids, fused, start=self.length)[:, -1:]
        self.length += len(next_ids)

    def propose(self, num_tokens: int) -> Proposal:
        """Draft a chain of `num_tokens` behind the last observed token."""
        if self._hidden is None:
            raise ConfigError("a drafter must observe the prompt before it can propose")
        hidden = self._hidden
        tokens: list[int] = []
        probabilities: list[Tensor] = []
        for step in range(num_tokens):
            if step:
                hidden = self._draft.recurrent(hidden)
                hidden = self._decode(tokens[-1:], hidden, start=self.length + step - 1)
            logits = self._draft.logits(hidden)[0, 0]
            if self._generator is None or self._temperature == 0:
                drafted = int(logits.argmax().item())
            else:
                draft_probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
                drafted = sample_token(draft_probabilities, self._generator)
                probabilities.append(self._in_target_vocabulary(draft_probabilities))
            tokens.append(drafted + int(self._draft.d2t[drafted].item()))
        return Proposal(
            tokens=tuple(tokens),
            probabilities=torch.stack(probabilities) if probabilities else None,
        )

    @property
    def _dtype(self) -> torch.dtype:
        weight: Tensor = self._draft.fc.weight
        return weight.dtype

    def _decode(self, ids: Sequence[int], hidden: Tensor, *, start: int) -> Tensor:
        input_ids = torch.tensor([ids], device=hidden.device)
        positions = torch.arange(start, start + len(ids), device=hidden.device).unsqueeze(0)
        return self._draft.decode(input_ids, hidden, positions, self._cache)

    def _in_target_vocabulary(self, probabilities: Tensor) -> Tensor:
        """Spread [D] draft probabilities over [V]; ids outside the draft vocabulary get 0."""
        target_ids = torch.arange(len(probabilities), device=probabilities.device) + self._draft.d2t
        spread = probabilities.new_zeros(len(self._draft.t2d))
        return spread.scatter_(0, target_ids, probabilities)
