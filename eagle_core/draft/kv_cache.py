"""The draft's key-value cache, for a batch of sequences of different lengths.

Shapes: B batch, T tokens, K key-value heads, E head size, W sliding window.
"""

import torch
from torch import Tensor
from torch.nn import functional


class DraftCache:
    """Keys and values of the entries so far, [B, K, length, E] each for each layer.

    The sequences of a batch may differ in length: padding entries are hidden.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._positions: Tensor | None = None
        self._valid_mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Return the number of entries."""
        return self._keys[0].shape[2] if self._keys else 0

    def place(self, positions: Tensor) -> None:
        """Give the entries that are appended next their positions [B, T] in their sequences.

        Only for a sliding window: entries of a batch with padding are not in its order.
        """
        before = positions[:, :0] if self._positions is None else self._positions
        self._positions = torch.cat([before, positions], dim=1)

    def append(self, keys: Tensor, values: Tensor, *, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Add entries [B, K, T, E] of a layer, in the order of layers; return all of that layer."""
        if layer == len(self._keys):
            self._keys.append(keys)
            self._values.append(values)
        else:
            self._keys[layer] = torch.cat([self._keys[layer], keys], dim=2)
            self._values[layer] = torch.cat([self._values[layer], values], dim=2)
        return self._keys[layer], self._values[layer]

    def crop(self, length: int) -> None:
        """Drop all entries from `length` on."""
        self._keys = [keys[:, :, :length] for keys in self._keys]
        self._values = [values[:, :, :length] for values in self._values]
        if self._positions is not None:
            self._positions = self._positions[:, :length]
        if self._valid_mask is not None:
            self._valid_mask = self._valid_mask[:, :length]

    def hide(self, valid_mask: Tensor) -> None:
        """Hide the newest entries whose `valid_mask` [B, T] is False from all later entries."""
        before = self._valid_mask_of(self.length - valid_mask.shape[1], valid_mask)
        self._valid_mask = torch.cat([before, valid_mask], dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep only the sequences at `rows`."""
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]
        if self._positions is not None:
            self._positions = self._positions[rows]
        if self._valid_mask is not None:
            self._valid_mask = self._valid_mask[rows]

    def visible(self, num_new: int, window: int | None = None) -> Tensor | None:
        """Return the attention mask [B or 1, 1, T, length] of the newest `num_new` entries.

        Each sees the valid entries of its sequence at or before it, with a window only those of the
        last W positions; None if nothing is masked.
        """
        if not self._keys or (num_new == 1 and self._valid_mask is None and window is None):
            return None
        causal = torch.ones(num_new, self.length, dtype=torch.bool, device=self._keys[0].device)
        causal = causal.tril(self.length - num_new)[None, None]
        if window is not None:
            causal = causal & self._within(num_new, window)
        if self._valid_mask is None:
            return causal
        valid_mask = self._valid_mask_of(self.length, self._valid_mask)
        return causal & valid_mask[:, None, None]

    def _within(self, num_new: int, window: int) -> Tensor:
        """Return [B, 1, T, length] whether an entry is among the last W before a new one."""
        if self._positions is None or self._positions.shape[1] != self.length:
            raise ValueError("a sliding window needs the position of every entry")
        oldest = self._positions[:, -num_new:] - window + 1
        return (self._positions.unsqueeze(1) >= oldest.unsqueeze(2)).unsqueeze(1)

    def _valid_mask_of(self, length: int, like: Tensor) -> Tensor:
        """Return the valid mask [B, length]; entries that were never masked are True."""
        known = like[:, :0] if self._valid_mask is None else self._valid_mask
        return functional.pad(known, (0, length - known.shape[1]), value=True)
