"""The draft's key-value cache, for a batch of sequences of different lengths.

Shapes: B batch, T tokens, K key-value heads, E head size.
"""

import torch
from torch import Tensor
from torch.nn import functional


class DraftCache:
    """Keys and values of the entries so far, [B, K, length, E] each.

    The sequences of a batch may differ in length: padding entries are hidden.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._valid_mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Return the number of entries."""
        return 0 if self._keys is None else self._keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add entries [B, K, T, E]; return all keys and values."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat([self._keys, keys], dim=2)
            values = torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        """Drop all entries from `length` on."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys[:, :, :length]
            self._values = self._values[:, :, :length]
        if self._valid_mask is not None:
            self._valid_mask = self._valid_mask[:, :length]

    def hide(self, valid_mask: Tensor) -> None:
        """Hide the newest entries whose `valid_mask` [B, T] is False from all later entries."""
        before = self._valid_mask_of(self.length - valid_mask.shape[1], valid_mask)
        self._valid_mask = torch.cat([before, valid_mask], dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep only the sequences at `rows`."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]
        if self._valid_mask is not None:
            self._valid_mask = self._valid_mask[rows]

    def visible(self, num_new: int) -> Tensor | None:
        """Return the attention mask [B or 1, 1, T, length] of the newest `num_new` entries.

        Each sees the valid entries of its sequence at or before it; None if nothing is masked.
        """
        if self._keys is None or (num_new == 1 and self._valid_mask is None):
            return None
        causal = torch.ones(num_new, self.length, dtype=torch.bool, device=self._keys.device)
        causal = causal.tril(self.length - num_new)[None, None]
        if self._valid_mask is None:
            return causal
        valid_mask = self._valid_mask_of(self.length, self._valid_mask)
        return causal & valid_mask[:, None, None]

    def _valid_mask_of(self, length: int, like: Tensor) -> Tensor:
        """Return the valid mask [B, length]; entries that were never masked are True."""
        known = like[:, :0] if self._valid_mask is None else self._valid_mask
        return functional.pad(known, (0, length - known.shape[1]), value=True)
