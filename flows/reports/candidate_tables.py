"""Table rows about candidates: other aux layers, and other sizes of the draft vocabulary."""

from collections.abc import Sequence

from eagle_core.closed_form.candidates import Comparison, Triple, TripleResult
from flows.reports.table import Row

_OF_MANY = 1.8
"""Margins that the best of 120 equal triples exceeds in one of twenty comparisons."""


def layer_rows(
    comparison: Comparison, *, configured: Triple, eagle3: Triple | None, hidden_size: int
) -> list[Row]:
    """Return the accuracy with each triple of aux layers, best first, and how it was measured."""
    names = {configured: ["configured"]}
    if eagle3 is not None:
        names.setdefault(eagle3, []).append("EAGLE-3 default")
    return [
        *(
            (f"aux {_listed(result.layers)}", _accuracy(result, names.get(result.layers, [])))
            for result in comparison.triples
        ),
        *_basis(comparison, hidden_size),
    ]


def vocabulary_rows(comparison: Comparison, *, configured: int) -> list[Row]:
    """Return what each size of the draft vocabulary covers, and the accuracy with it."""
    full = max(result.size for result in comparison.vocabularies)
    names = {full: ["the target's"]}
    names.setdefault(configured, []).insert(0, "configured")
    return [
        (
            f"vocabulary of {result.size:,}",
            f"{result.accuracy:.1%} accuracy, covers {result.coverage:.1%} of supervised tokens"
            + _named(names.get(result.size, [])),
        )
        for result in comparison.vocabularies
    ]


def next_rows(comparison: Comparison, *, configured: Triple) -> list[Row]:
    """Return how to try the first triple that is better than the configured one beyond chance.

    The best of many must be better by more than the margin of one.
    """
    better = [one.layers for one in comparison.triples if _is_better(one)]
    if not better:
        return [("", f"No triple is better than aux {_listed(configured)} beyond chance.")]
    chosen = ",".join(map(str, better[0]))
    return [
        (f"try {_listed(better[0])}", f"--set target.aux_layers=[{chosen}]"),
        ("", "A store keeps the layers that it has: other layers need a new store (store.root)."),
    ]


def _is_better(result: TripleResult) -> bool:
    return result.margin is not None and result.difference > _OF_MANY * result.margin


def _basis(comparison: Comparison, hidden_size: int) -> list[Row]:
    width = comparison.features_per_layer
    what = "held-out conversations" if comparison.is_held_out else "conversations set apart"
    held_out = f"{comparison.num_conversations:,} {what}"
    rows = [
        ("accuracy", "a linear prediction proposes the target's token, before any training"),
        ("solved on", f"{comparison.num_positions:,} supervised positions"),
        ("measured on", f"{comparison.num_held_out:,} positions of {held_out}"),
        (
            "compared",
            f"{comparison.num_triples:,} triples of the layers {_listed(comparison.layers)}",
        ),
        ("±", "95 % of one comparison: the best of many looks better than it is"),
    ]
    if width < hidden_size:
        rows.append(
            (
                "read of each layer",
                f"{width:,} principal directions of {hidden_size:,} channels: a lower bound",
            )
        )
    return rows


def _accuracy(result: TripleResult, names: Sequence[str]) -> str:
    share = f"{result.accuracy:.1%}"
    if "configured" in names:
        return share + _named(names)
    margin = "" if result.margin is None else f" ± {100 * result.margin:.1f}"
    points = round(100 * result.difference, 1) + 0.0  # never -0.0
    return f"{share} ({points:+.1f}{margin} points){_named(names)}"


def _named(names: Sequence[str]) -> str:
    return f"  <- {', '.join(names)}" if names else ""


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
