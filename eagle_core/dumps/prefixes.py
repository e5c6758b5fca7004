"""Rows of tokens that are beginnings of other rows. Pure.

A tool that writes a row per answer, each with everything before it, stores a conversation of n
answers n times. The longest row holds the states of all of them.

Each row is known by digests of its length and tokens; of a row, all beginnings are looked up by a
rolling hash, and what is found is confirmed by a real digest. Equal rows are looked up once.
Memory: some hundred bytes per row.
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
    groups: Sequence[Sequence[int]]
    """Rows with equal tokens, in the given order."""
    group_of: dict[int, int]
    """By row; absent if it could not be read."""
    inside: dict[int, tuple[int, ...]]
    """By group, the groups of the beginnings of its rows."""

    def parts_of(self, row: int) -> list[int]:
        """Return all other rows whose tokens a row begins with, or has."""
        own = self.group_of.get(row)
        if own is None:
            return []
        around = (own, *self.inside.get(own, ()))
        return [part for group in around for part in self.groups[group] if part != row]


def find_prefixes(num_rows: int, ids_of: Callable[[int], NDArray[np.int64] | None]) -> Prefixes:
    """Return which of the rows are beginnings of others; equal rows are of the first.

    `ids_of` is called up to twice for each row; it returns None for one that cannot be read.
    """
    hashes = np.zeros(num_rows, np.uint64)
    lengths = np.full(num_rows, -1, np.int64)
    group_by_digest: dict[bytes, int] = {}
    groups: list[list[int]] = []
    group_of: dict[int, int] = {}
    for row in range(num_rows):
        ids = ids_of(row)
        if ids is None or not len(ids):
            continue
        lengths[row], hashes[row] = len(ids), _rolling(ids)[-1]
        group = group_by_digest.setdefault(_digest(ids), len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(row)
        group_of[row] = group
    inside = _inside(groups, group_by_digest, np.unique(hashes[lengths > 0]), ids_of)
    covers = _covers(groups, inside, lengths)
    return Prefixes(
        order=_order(lengths, covers),
        covers=covers,
        groups=groups,
        group_of=group_of,
        inside=inside,
    )


def _inside(
    groups: Sequence[Sequence[int]],
    group_by_digest: dict[bytes, int],
    known: NDArray[np.uint64],
    ids_of: Callable[[int], NDArray[np.int64] | None],
) -> dict[int, tuple[int, ...]]:
    """Return by group those of shorter rows that its rows begin with."""
    inside = {}
    for group, rows in enumerate(groups):
        ids = ids_of(rows[0])
        if ids is None:
            continue
        ends = np.flatnonzero(np.isin(_rolling(ids)[:-1], known)) + 1
        found = (group_by_digest.get(_digest(ids[:end])) for end in ends.tolist())
        if shorter := tuple(other for other in found if other is not None):
            inside[group] = shorter
    return inside


def _covers(
    groups: Sequence[Sequence[int]], inside: dict[int, tuple[int, ...]], lengths: NDArray[np.int64]
) -> dict[int, tuple[int, ...]]:
    """Return by row the longest rows that contain it, then earlier equal ones."""
    around: dict[int, list[int]] = {}
    for group, shorter in inside.items():
        for other in shorter:
            around.setdefault(other, []).append(group)
    covers = {}
    for group, rows in enumerate(groups):
        longer = sorted(around.get(group, ()), key=lambda one: -int(lengths[groups[one][0]]))
        longest = [row for one in longer[:_MOST_COVERS] for row in groups[one][:_MOST_COVERS]]
        for place, row in enumerate(rows):
            if found := (*longest, *rows[: min(place, _MOST_COVERS)])[:_MOST_COVERS]:
                covers[row] = found
    return covers


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
