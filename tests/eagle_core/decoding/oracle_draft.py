"""A draft that knows what the target will say, and errs where it is told to."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from eagle_core.draft.kv_cache import DraftCache


class OracleDraft:
    """Implements what drafting asks of a draft model; its state is the position, nothing else."""

    def __init__(
        self, text: Sequence[int], vocab_size: int, wrong_at: Collection[int] = ()
    ) -> None:
        self._text = list(text)
        self._vocab_size = vocab_size
        self._wrong_at = frozenset(wrong_at)
        self.d2t = torch.zeros(vocab_size, dtype=torch.int64)
        self.t2d = torch.ones(vocab_size, dtype=torch.bool)
        self.fc = nn.Linear(1, 1)

    def fuse(self, aux: Tensor) -> Tensor:
        """Return [..., 1]."""
        return aux[..., :1] * 0

    def decode(
        self,
        input_ids: Tensor,
        hidden: Tensor,  # noqa: ARG002
        positions: Tensor,
        cache: DraftCache,
    ) -> Tensor:
        """Check that the ids are the text's own, then return the positions."""
        for token, position in zip(input_ids[0].tolist(), positions[0].tolist(), strict=True):
            known = self._text[position + 1 : position + 2]
            assert position in self._wrong_at or position - 1 in self._wrong_at or [token] == known
        entries = torch.zeros(1, 1, input_ids.shape[1], 1)
        cache.append(entries, entries)
        return positions.unsqueeze(-1).float()

    def recurrent(self, hidden: Tensor) -> Tensor:
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Prefer the token two places on, or its neighbour where the oracle errs."""
        position = int(hidden.reshape(-1)[-1])
        token = self._text[position + 2] if position + 2 < len(self._text) else 0
        if position in self._wrong_at:
            token = (token + 1) % self._vocab_size
        one_hot = torch.nn.functional.one_hot(torch.tensor(token), self._vocab_size)
        return one_hot.float().reshape(1, 1, -1)
