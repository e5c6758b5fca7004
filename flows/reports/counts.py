"""Counts by name, in one line of a log."""

from collections.abc import Mapping

MUCH = 0.1
"""Share of records dropped from which on a warning says so."""
_MAX_NAMES = 12


def counts_text(counts: Mapping[str, int]) -> str:
    """Return counts by name, the largest first, up to twelve names."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    shown = [f"{name} {counts[name]:,}" for name in names[:_MAX_NAMES]]
    others = len(names) - len(shown)
    return ", ".join([*shown, f"and {others:,} more"] if others else shown)
