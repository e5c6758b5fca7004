"""Columns for hundreds of millions of samples, and lookups in them."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ID_BYTES = 16
_ID = re.compile(r"[0-9a-f]{32}")
BLOCK = 1 << 20
"""Samples per lookup block: intermediate results stay in the CPU cache."""
MOST_BITS = 27


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SampleRows:
    """N samples of some shards, sorted by shard, then by position in it."""

    shard_ids: NDArray[np.bytes_]
    """[S] 16 bytes each, ascending"""
    shards: NDArray[np.int64]
    """[N] index into `shard_ids`, non-decreasing"""
    sample_ids: NDArray[np.bytes_]
    """[N] 16 bytes each"""
    tokens: NDArray[np.int32]
    """[N] tokens"""
    supervised: NDArray[np.int32]
    """[N] supervised tokens"""

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of each of these rows in its shard."""
        starts = np.searchsorted(self.shards, np.arange(len(self.shard_ids)))
        return rows - starts[self.shards[rows]]


class Wanted:
    """M samples to look up among many more."""

    def __init__(self, sample_ids: Collection[str]) -> None:
        """Take the samples to look up; duplicates count once."""
        self.sample_ids, self.places = np.unique(ids_of(sample_ids), return_inverse=True)
        """[M] ascending, and the index in it of each given sample"""
        self._keys = _keys(self.sample_ids)
        bits = min(MOST_BITS, max(10, (16 * len(self.sample_ids)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._may_be = np.zeros(1 << bits, np.bool_)
        self._may_be[(self._keys >> self._shift).astype(np.int64)] = True

    def __len__(self) -> int:
        """Return M."""
        return len(self.sample_ids)

    def found_in(self, many: Iterable[NDArray[np.bytes_]]) -> NDArray[np.bool_]:
        """Return for each given sample whether it is in one of many columns of ids."""
        found = np.zeros(len(self), np.bool_)
        for sample_ids in many:
            for _, at in self.find(sample_ids):
                found[at] = True
        each: NDArray[np.bool_] = found[self.places]
        return each

    def find(
        self, sample_ids: NDArray[np.bytes_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the indices of wanted samples in [N] `sample_ids`, and their indices in [M]."""
        for first in range(0, len(sample_ids), BLOCK):
            block = sample_ids[first : first + BLOCK]
            keys = _keys(block)
            rows = np.flatnonzero(self._may_be[(keys >> self._shift).astype(np.int64)])
            at = np.searchsorted(self._keys, keys[rows])
            while len(rows):  # repeats only if two of them share their first 8 bytes
                inside = at < len(self._keys)
                rows, at = rows[inside], at[inside]
                equal = self.sample_ids[at] == block[rows]
                if equal.any():
                    yield rows[equal] + first, at[equal]
                again = ~equal & (self._keys[at] == keys[rows])
                rows, at = rows[again], at[again] + 1


def ids_of(names: Collection[str]) -> NDArray[np.bytes_]:
    """Return ids of 32 hex digits as [N] 16 bytes each."""
    return np.frombuffer(bytes.fromhex("".join(names)), f"S{ID_BYTES}")


def is_id(name: str) -> bool:
    """Return whether a name is an id: 32 hex digits. A store may contain foreign files."""
    return _ID.fullmatch(name) is not None


def names_of(ids: NDArray[np.bytes_]) -> list[str]:
    """Return [N] ids of 16 bytes as 32 hex digits each."""
    digits = np.ascontiguousarray(ids).tobytes().hex()
    width = 2 * ID_BYTES
    return [digits[at : at + width] for at in range(0, len(digits), width)]


def _keys(ids: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """Return the first 8 bytes of each id as a number, in the order of the ids."""
    halves = np.ascontiguousarray(ids).view(">u8").reshape(-1, 2)
    return halves[:, 0].astype(np.uint64)
