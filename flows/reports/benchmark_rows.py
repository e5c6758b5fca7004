"""Table rows of a benchmark sweep: each set with its turns and categories, then the mean."""

import math
from collections.abc import Sequence

from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.benchmarks.report import BenchmarkReport, MeanAcceptance, SweepReport
from flows.reports.table import Row


def benchmark_rows(found: SweepReport) -> list[Row]:
    """Return one row for each set, turn and category, and a last one with the mean."""
    rows = [row for one in found.sets for row in _set_rows(one)]
    return [*rows, (f"mean of {len(found.sets)} sets", _mean(found.mean))]


def source_rows(found: SweepReport) -> list[Row]:
    """Return what was read of each set."""
    return [(f"{one.name}, read from", one.source) for one in found.sets]


def _set_rows(one: BenchmarkReport) -> list[Row]:
    start = None if one.untrained is None else one.untrained.acceptance_length
    rows = [(one.name, _figures(one.trained, start))]
    rows += [(f"{one.name}, turn {turn}", _figures(part)) for turn, part in one.by_turn.items()]
    rows += [
        (f"{one.name}, {category or 'no category'}", _figures(part))
        for category, part in one.by_category.items()
    ]
    rows += [(f"{one.name}, not asked", _not_asked(one))] if _not_asked(one) else []
    return rows


def _figures(report: AcceptanceReport, start: float | None = None) -> str:
    text = _length(report.acceptance_length, *report.acceptance_interval, start)
    prompts = "1 prompt" if report.num_prompts == 1 else f"{report.num_prompts:,} prompts"
    return "; ".join(
        [text, _depths(report.acceptance_by_depth), *_speedup(report.speedup), prompts]
    )


def _mean(mean: MeanAcceptance) -> str:
    text = _length(mean.acceptance_length, *mean.acceptance_interval, mean.untrained_length)
    return "; ".join([text, _depths(mean.acceptance_by_depth), *_speedup(mean.speedup)])


def _length(length: float, low: float, high: float, start: float | None) -> str:
    text = f"{length:.2f} tokens per target forward (95 %: {low:.2f} to {high:.2f})"
    return text if start is None else f"{text}, {start:.2f} at the start"


def _depths(shares: Sequence[float]) -> str:
    listed = "  ".join("-" if math.isnan(share) else f"{share:.0%}" for share in shares)
    return f"by depth {listed}"


def _speedup(speedup: float | None) -> list[str]:
    return [] if speedup is None else [f"{speedup:.2f}x"]


def _not_asked(one: BenchmarkReport) -> str:
    reasons = [f"{count:,} {reason}" for reason, count in one.left_out.items()]
    if one.num_without_text:
        reasons.append(f"{one.num_without_text:,} without a text in the file")
    return "; ".join(reasons)
