"""Rows that are beginnings of others are found, whatever the order."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eagle_core.dumps.prefixes import find_prefixes, merged

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


def _contains(row: Sequence[int], other: Sequence[int], at: int, other_at: int) -> bool:
    if len(other) > len(row) or list(row[: len(other)]) != list(other) or at == other_at:
        return False
    return len(other) < len(row) or other_at > at


@given(ROWS)
def test_every_beginning_is_found_and_comes_after_what_contains_it(rows: list[list[int]]) -> None:
    found = find_prefixes(len(rows), lambda row: np.array(rows[row], np.int64))
    for at, row in enumerate(rows):
        inside = {
            other_at for other_at, other in enumerate(rows) if _contains(row, other, at, other_at)
        }
        equal = {other_at for other_at, other in enumerate(rows) if other == row} - {at}
        parts = found.parts_of(at)
        assert len(parts) == len(set(parts))
        assert set(parts) == inside | equal
        around = {
            other_at for other_at, other in enumerate(rows) if _contains(other, row, other_at, at)
        }
        assert set(found.covers.get(at, ())) == around
    place = {row: number for number, row in enumerate(found.order)}
    assert sorted(place) == list(range(len(rows)))
    for row, covers in found.covers.items():
        assert place[covers[0]] < place[row]


def test_rows_that_cannot_be_read_stay_in_their_places() -> None:
    rows = [np.array([1, 2]), None, np.array([1, 2, 3])]
    found = find_prefixes(3, lambda row: rows[row])
    assert found.order == (1, 2, 0)
    assert found.covers == {0: (2,)}


def test_equal_rows_are_looked_up_once() -> None:
    """Ten thousand equal rows took hours, and gigabytes."""
    calls = 0

    def ids_of(_row: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.array([1, 2, 3])

    found = find_prefixes(10_000, ids_of)
    assert calls == 10_001
    assert found.covers[9_999] == tuple(range(16))
    assert len(found.parts_of(0)) == 9_999


def test_masks_of_beginnings_are_added() -> None:
    whole, part = np.array([0, 0, 0, 1], np.bool_), np.array([0, 1], np.bool_)
    assert merged([whole, part]).tolist() == [False, True, False, True]
