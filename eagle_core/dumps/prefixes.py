"""Rows of tokens that are beginnings of other rows. Pure.

A tool that writes a row per answer, each with everything before it, stores a conversation of n
answers n times. The longest row holds the states of all of them.

Each row is known by digests of its length and tokens; of a row, all beginnings are looked up by a
rolling hash, and what is found is confirmed by a real digest. Memory: about 100 bytes per row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)
_MOST_COVERS = 16
"""Longer rows that are remembered for a row: they only matter if all of them are damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefixes:
    """Which rows are beginnings of which."""

    order: tuple[int, ...]
    """All rows: each after those that contain it, otherwise in the given order."""
    covers: dict[int, tuple[int, ...]]
    """By row, some rows that contain it, longest first; absent if none does."""
    parts: dict[int, tuple[int, ...]]
    """By row, all rows that it contains."""


def find_prefixes(num_rows: int, ids_of: Callable[[int], NDArray[np.int64] | None]) -> Prefixes:
    """Return which of the rows are beginnings of others; equal rows are of the first.

    `ids_of` is called twice for each row; it returns None for one that cannot be read.
    """
    hashes = np.zeros(num_rows, np.uint64)
    lengths = np.full(num_rows, -1, np.int64)
    rows_of: dict[bytes, list[int]] = {}
    for row in range(num_rows):
        ids = ids_of(row)
        if ids is not None and len(ids):
            lengths[row], hashes[row] = len(ids), _rolling(ids)[-1]
            rows_of.setdefault(_digest(ids), []).append(row)
    known = np.unique(hashes[lengths > 0])
    covers: dict[int, list[int]] = {}
    parts: dict[int, tuple[int, ...]] = {}
    for row in range(num_rows):
        ids = ids_of(row) if lengths[row] > 0 else None
        if ids is None:
            continue
        ends = np.flatnonzero(np.isin(_rolling(ids), known)) + 1
        inside = [
            other
            for end in ends.tolist()
            for other in rows_of.get(_digest(ids[:end]), ())
            if end < len(ids) or other > row
        ]
        for other in inside:
            covers.setdefault(other, []).append(row)
        if inside:
            parts[row] = tuple(inside)
    ordered = {
        row: tuple(sorted(found, key=lambda one: (-int(lengths[one]), one)))
        for row, found in covers.items()
    }
    return Prefixes(
        order=_order(lengths, ordered),
        covers={row: found[:_MOST_COVERS] for row, found in ordered.items()},
        parts=parts,
    )


def _order(lengths: NDArray[np.int64], covers: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the rows so that each comes behind the longest that contains it."""

    def place(row: int) -> tuple[int, int, int]:
        longest = covers.get(row, (row,))[0]
        return longest, -int(lengths[row]), row

    return tuple(sorted(range(len(lengths)), key=place))


def _rolling(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return [T] hashes of the first 1, 2, ... T tokens."""
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * _MIX
    mixed ^= mixed >> _SHIFT
    powers = np.cumprod(np.full(len(ids), _BASE, np.uint64), dtype=np.uint64)
    return np.cumsum(mixed * powers, dtype=np.uint64)


def _digest(ids: NDArray[np.int64]) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(ids, np.int64).tobytes())


def merged(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Return the union of a row's mask, the first, with those of its beginnings."""
    union = masks[0].copy()
    for mask in masks[1:]:
        union[: len(mask)] |= mask
    return union
