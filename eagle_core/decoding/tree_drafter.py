"""Tree drafting: the EAGLE-3 recurrence run forward along several paths at once.

Each level continues the `top_k` best tokens of the level before, by the probability of their paths.
All paths share the draft's cache: an entry sees those of the text and of its own path. Invariant:
entries that are kept come only from the target's aux states, as in `chain_drafter`.

Shapes: T tokens, k continued tokens, P entries of the text, E entries of the tree, H draft hidden,
Ht target hidden, D draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_core.decoding.chain_drafter import DraftNetwork
from eagle_core.decoding.config import TreeConfig
from eagle_core.decoding.draft_tree import ROOT, DraftTree, best_nodes
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.errors import ConfigError


class TreeDrafter:
    """Drafts trees for one sequence: `observe` the target's states, then `propose`."""

    def __init__(self, draft: DraftNetwork, config: TreeConfig) -> None:
        self._draft = draft
        self._config = config
        self._cache = _TreeCache()
        self._num_entries = 0
        self._hidden: Tensor | None = None

    def observe(self, next_ids: Sequence[int], aux: Tensor) -> None:
        """Append entries: `aux` [T, 3Ht] of T tokens and, for each, the id of the next one.

        Replaces the entries that the last tree appended from its own hidden states.
        """
        self._cache.crop(self._num_entries)
        self._cache.shown = None
        ids = torch.tensor([*next_ids], device=aux.device)
        positions = torch.arange(len(next_ids), device=aux.device) + self._num_entries
        fused = self._draft.fuse(aux.to(self._draft.fc.weight.dtype))
        self._hidden = self._decode(ids, fused, positions)[-1:]
        self._num_entries += len(next_ids)

    def propose(self) -> DraftTree:
        """Draft a tree after the last observed token."""
        if self._hidden is None:
            raise ConfigError("a drafter must observe the prompt before it can propose")
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[Tensor] = []
        level = _Level.first(self._hidden)
        for depth in range(1, self._config.depth + 1):
            candidates = self._likeliest(level)
            first = len(tokens)
            tokens += candidates.tokens.flatten().tolist()
            parents += [node for node in level.nodes for _ in range(candidates.tokens.shape[1])]
            scores.append(candidates.scores.flatten())
            if depth < self._config.depth:
                level = self._continued(level, candidates, first=first, depth=depth)
        return best_nodes(tokens, parents, torch.cat(scores), num_nodes=self._config.nodes)

    def _likeliest(self, level: "_Level") -> "_Candidates":
        """Return the likeliest tokens after each token of a level."""
        logits = self._draft.logits(level.states)
        chances = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        found = chances.topk(min(self._config.top_k, chances.shape[-1]), dim=-1)
        # No path is likelier than its beginning, whatever is rounded.
        scores = level.scores.unsqueeze(1) + found.values.clamp_max(0)
        return _Candidates(tokens=found.indices + self._draft.d2t[found.indices], scores=scores)

    def _continued(
        self, level: "_Level", candidates: "_Candidates", *, first: int, depth: int
    ) -> "_Level":
        """Return the next level: the best candidates, whose nodes count from `first`."""
        per_row = candidates.tokens.shape[1]
        count = min(self._config.top_k, candidates.scores.numel())
        best = candidates.scores.flatten().topk(count)
        rows = best.indices // per_row
        own = torch.eye(count, dtype=torch.bool, device=rows.device)
        seen = torch.cat([level.seen[rows], own], dim=1)
        self._cache.shown = seen
        ids = candidates.tokens.flatten()[best.indices]
        positions = torch.full_like(ids, self._num_entries + depth - 1)
        states = self._decode(ids, self._draft.recurrent(level.states[rows]), positions)
        nodes = [first + index for index in best.indices.tolist()]
        return _Level(nodes=nodes, scores=best.values, states=states, seen=seen)

    def _decode(self, ids: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return the states [T, H] of ids [T] and states [T, H] at positions [T]."""
        return self._draft.decode(
            ids.unsqueeze(0), hidden.unsqueeze(0), positions.unsqueeze(0), self._cache
        )[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Level:
    """Tokens of one depth that are continued."""

    nodes: Sequence[int]
    """[k] their candidates, counted over the whole tree."""
    scores: Tensor
    """[k] log-probability of the path to each."""
    states: Tensor
    """[k, H] the draft's pre-norm states of them."""
    seen: Tensor
    """[k, E] the entries of the tree on the path to each, its own included."""

    @classmethod
    def first(cls, hidden: Tensor) -> "_Level":
        """Return the root, with the state [1, H] of the text's last entry."""
        seen = torch.ones(1, 0, dtype=torch.bool, device=hidden.device)
        scores = torch.zeros(1, device=hidden.device)
        return cls(nodes=[ROOT], scores=scores, states=hidden, seen=seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidates:
    """The likeliest tokens after each token of a level."""

    tokens: Tensor
    """[k, top_k] target-vocabulary ids."""
    scores: Tensor
    """[k, top_k] log-probability of the path to each."""


class _TreeCache(DraftCache):
    """A draft's cache whose newest entries are a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: Tensor | None = None
        """[T, E] entries of the tree that the next T see; None outside a tree."""

    def visible(self, num_new: int, window: int | None = None) -> Tensor | None:
        """Return the attention mask [1, 1, T, P + E] of the newest `num_new` entries."""
        if self.shown is None:
            return super().visible(num_new, window)
        text = self.shown.new_ones(num_new, self.length - self.shown.shape[1])
        seen = torch.cat([text, self.shown], dim=1)[None, None]
        return seen if window is None else seen & self._within(num_new, window)
