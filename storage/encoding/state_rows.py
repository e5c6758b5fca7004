"""The state rows of many samples as one sequence, without copying them all.

Shapes: R rows, L layers (absent for the last hidden state), H hidden size; bfloat16 bits in uint16.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.bfloat16 import BLOCK_VALUES

Bits = NDArray[np.uint16]


class StateRows:
    """[R, (L,) H] in parts of [r, (L,) H]."""

    def __init__(self, parts: Sequence[Bits]) -> None:
        """Take at least one part, perhaps empty; parts must agree in all axes but the first."""
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (R, (L,) H)."""
        return (int(self._starts[-1]), *self._parts[0].shape[1:])

    @property
    def layers(self) -> Sequence[tuple[int, ...]]:
        """Return the indices into the axes between rows and channels, one per layer."""
        return list(np.ndindex(self.shape[1:-1]))

    def every(self, step: int) -> Bits:
        """Return a copy of each row whose index is a multiple of `step`."""
        return np.concatenate(
            [
                part[-start % step :: step]
                for part, start in zip(self._parts, self._starts.tolist(), strict=False)
            ]
        )

    def blocks(self, first: int, stop: int, layer: tuple[Any, ...]) -> Iterator[tuple[slice, Bits]]:
        """Yield rows `first` to `stop` of a layer: the slice relative to `first`, and [r, H]."""
        block_rows = max(1, BLOCK_VALUES // self.shape[-1])
        part = int(np.searchsorted(self._starts, first, side="right")) - 1
        row = first
        while row < stop:
            start, end = int(self._starts[part]), int(self._starts[part + 1])
            until = min(row + block_rows, end, stop)
            if until > row:
                rows = self._parts[part][row - start : until - start]
                yield slice(row - first, until - first), rows[(slice(None), *layer)]
            row = until
            if row == end:
                part += 1
