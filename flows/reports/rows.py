"""Summaries as table rows, for the terminal and for artifacts in the Prefect UI."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eagle_core.data.manifest import SourceCounts
from eagle_core.draft.vocabulary import SourceCoverage
from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.config import EvaluationEngine
from eagle_core.evaluation.estimate import expected_length
from eagle_core.training.config import CLOSED_FORM
from eagle_core.training.result import Metrics, Start
from flows.reports.benchmark_rows import benchmark_rows, source_rows
from flows.reports.engine_tables import acceptance_text, engine_rows, length_text
from flows.reports.run_record import REPORT_NAME, evaluation_name
from flows.reports.table import Row
from flows.reports.units import human_bytes
from flows.summaries import (
    DatasetSummary,
    EstimateSummary,
    EvaluateSummary,
    HiddenStatesSummary,
    ImportSummary,
    OfflineSummary,
    OnlineSummary,
    TrainSummary,
)

_MAX_UNREAD = 12
"""Names of fields in a table; the manifest has all of them."""


def dataset_rows(summary: DatasetSummary) -> list[Row]:
    """Return the figures of a data set: what was read, kept, dropped, changed and not read."""
    share = f" ({summary.dropped_share:.1%})" if summary.num_dropped else ""
    return [
        ("records read", f"{summary.num_records:,}"),
        ("conversations to train on", f"{summary.num_train:,}"),
        ("held out", f"{summary.num_held_out:,}"),
        *((f"of {name}", _counts_of(counts)) for name, counts in summary.by_source.items()),
        ("dropped", f"{summary.num_dropped:,}{share}"),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in summary.dropped.items()),
        *((f"changed: {change}", f"{count:,}") for change, count in summary.changed.items()),
        *_unread_rows(summary.unread),
        ("ledger, with locations", str(summary.ledger_path)),
        ("data set", str(summary.path)),
        ("fingerprint", summary.fingerprint),
        ("seconds", f"{summary.seconds:.1f}"),
    ]


def _counts_of(counts: SourceCounts) -> str:
    return (
        f"{counts.num_records:,} read, {counts.num_train:,} to train on, "
        f"{counts.num_held_out:,} held out"
    )


def _unread_rows(unread: Mapping[str, int]) -> list[Row]:
    """Return the most frequent fields that nothing reads."""
    first = sorted(unread, key=lambda name: (-unread[name], name))[:_MAX_UNREAD]
    rows = [(f"not read: {name}", f"{unread[name]:,}") for name in first]
    others = len(unread) - len(first)
    return [*rows, ("not read: others", f"{others:,} fields")] if others else rows


def hidden_states_rows(states: HiddenStatesSummary) -> list[Row]:
    """Return the figures of a store after generation, with its size relative to the raw size."""
    return [
        ("samples", f"{states.num_samples:,}"),
        ("tokens", f"{states.num_tokens:,}"),
        ("supervised tokens", f"{states.num_supervised_tokens:,}"),
        *([("excluded", _excluded(states))] if states.num_excluded else []),
        ("shards", f"{states.num_shards:,} ({states.shards_made:,} computed now)"),
        ("bytes per token, raw", f"{states.raw_bytes_per_token:,.0f}"),
        ("bytes per token, stored", f"{states.stored_bytes_per_token:,.0f} ({states.profile})"),
        ("size, raw", human_bytes(states.raw_bytes)),
        ("size, stored", f"{human_bytes(states.stored_bytes)} ({_ratio(states)} of raw)"),
        ("snapshot", states.snapshot_id),
        ("store", states.store_root),
        ("seconds", f"{states.seconds:.1f}"),
    ]


def import_rows(summary: ImportSummary) -> list[Row]:
    """Return what came of the rows of a dump, and the figures of the store."""
    checked = f"{summary.num_checked} rows, largest relative error {summary.largest_error:.2g}"
    return [
        ("rows in the dump", f"{summary.num_rows:,}"),
        ("imported now", f"{summary.num_imported:,}"),
        *([("imported before", f"{summary.num_before:,}")] if summary.num_before else []),
        *(("  dropped: " + reason, f"{count:,}") for reason, count in summary.dropped.items()),
        *(("  changed: " + change, f"{count:,}") for change, count in summary.changed.items()),
        ("ledger", str(summary.ledger_path)),
        ("compared with the target", checked if summary.num_checked else "no"),
        *hidden_states_rows(summary.states),
    ]


def _excluded(states: HiddenStatesSummary) -> str:
    samples = "1 sample" if states.num_excluded == 1 else f"{states.num_excluded:,} samples"
    return f"{samples} without finite states (eyas inspect lists them)"


def train_rows(summary: TrainSummary) -> list[Row]:
    """Return the figures of a training run."""
    figures = summary.figures
    return [
        ("start", _start(summary.start)),
        ("steps", f"{summary.num_steps:,}"),
        ("loss, first and last step", f"{figures.first_loss:.3f} -> {figures.loss:.3f}"),
        ("loss by TTT step", _series(figures.step_losses, "{:.2f}")),
        ("held-out accuracy by TTT step", _series(figures.held_out_accuracies, "{:.1%}")),
        *_held_out_lengths(figures),
        *_decoded_while_training(summary),
        ("draft vocabulary covers", f"{summary.vocabulary_coverage:.1%} of supervised tokens"),
        *((f"of {name}", _covered(one)) for name, one in summary.coverage_by_source.items()),
        (
            "tokens per second",
            f"{summary.tokens_per_second:,.0f} (matrix products in {summary.dtype})",
        ),
        ("run", str(summary.run_path)),
        ("seconds", f"{summary.seconds:.1f}"),
    ]


def _start(start: Start | None) -> str:
    """Return how the draft began, and what it was worth then."""
    if start is None:
        return "random"
    if start.refused:
        return f"random, for solved weights were refused: {start.refused}"
    if start.is_drawn:
        return start.kind
    name = "closed form" if start.kind == CLOSED_FORM else start.kind
    if start.refit_from:
        layers = ", ".join(map(str, start.refit_from))
        name = f"{name}, refit from aux layers {layers} (misfit {start.misfit:.1%})"
    where = "held-out length" if start.is_held_out else "length on its own samples"
    return (
        f"{name}: {where}, joint prefix {start.acceptance_length:.2f}, accuracy by TTT step "
        f"{_series(start.accuracies, '{:.1%}')} ({start.seconds:.0f} s)"
    )


def _covered(source: SourceCoverage) -> str:
    """Return the coverage of one source; there is none of nothing."""
    return (
        f"{source.share:.1%} of {source.num_supervised:,} supervised tokens, "
        f"{source.num_samples:,} samples to train on"
        if source.num_supervised
        else "nothing to train on"
    )


def _held_out_lengths(figures: Metrics) -> list[Row]:
    """Return the expected acceptance length over all held-out positions, greedy and sampled."""
    if not figures.held_out_step:
        return []
    sampled = float(expected_length(np.array(figures.held_out_acceptances)))
    return [
        ("held-out length, joint prefix", f"{figures.held_out_length:.2f}"),
        ("held-out length, total variation", f"{sampled:.2f}"),
    ]


def _decoded_while_training(summary: TrainSummary) -> list[Row]:
    """Return what was decoded last, and which checkpoint is the best by which measure."""
    rows: list[Row] = []
    if summary.decoded is not None:
        found, step = summary.decoded.decoded, f"step {summary.decoded.step:,}"
        rows = [
            (f"decoded length, {step}", f"{found.acceptance_length:.2f}"),
            (f"decoded acceptance by depth, {step}", _series(found.acceptance_by_depth, "{:.0%}")),
        ]
    if summary.best is not None:
        by = {"joint_prefix": "held-out length, joint prefix", "decoding": "decoded length"}
        best = f"step {summary.best.step:,} ({by[summary.best.by]} {summary.best.length:.2f})"
        rows.append(("best checkpoint", best))
    return rows


def evaluate_rows(summary: EvaluateSummary) -> list[Row]:
    """Return acceptance before and after training, the estimate, and the speed."""
    trained, start, found = summary.trained, summary.untrained, summary.estimate
    rows = [("warning", summary.warning)] if summary.warning else []
    rows += _decoded_rows(summary)
    if start is not None:
        rows.append(("acceptance length, at the start", acceptance_text(start)))
    rows.append(("acceptance length, trained", acceptance_text(trained)))
    rows += [
        (f"acceptance length, {group}", f"{acceptance_text(part)}, {part.num_prompts:,} prompts")
        for group, part in summary.trained_by_group.items()
    ]
    if summary.benchmarks is not None:
        rows += benchmark_rows(summary.benchmarks)
    if found is not None:
        length = length_text(found.acceptance_length, *found.acceptance_interval)
        own = f"{found.on_policy:.0%} of the stored answers are the target's own"
        rows.append(("acceptance length, estimated", f"{length}; {own}"))
    if start is not None:
        rows.append(("acceptance by depth, at the start", _depths(start)))
    rows.append(("acceptance by depth, trained", _depths(trained)))
    if found is not None:
        shares = _series(found.acceptance_by_depth, "{:.0%}")
        rows.append(("acceptance by depth, estimated", shares))
    if summary.engine is None:
        rows += _speed_rows(summary)
    else:
        rows += engine_rows(summary.engine)
    if summary.benchmarks is not None:
        rows += source_rows(summary.benchmarks)
    return [*rows, ("seconds", f"{summary.seconds:.1f}")]


def _decoded_rows(summary: EvaluateSummary) -> list[Row]:
    """Return what was decoded, and how."""
    asked = summary.evaluation.prompts or "held-out"
    if summary.benchmarks is not None:
        asked = ", ".join(one.name for one in summary.benchmarks.sets)
    rows = [("prompts", f"{summary.trained.num_prompts:,} ({asked})")]
    if (tree := summary.evaluation.tree) is not None:
        size = f"{tree.nodes} tokens, depth {tree.depth}, top {tree.top_k}"
        rows.append(("drafted", f"trees of {size}"))
    if summary.engine is not None:
        rows.append(("decoded by", f"{summary.engine.engine}, {summary.engine.dtype}"))
    return rows


def _speed_rows(summary: EvaluateSummary) -> list[Row]:
    trained = summary.trained
    together = summary.evaluation.batch_prompts
    how = "one prompt at a time" if together == 1 else f"{together} prompts at a time"
    rows = [("decoding, tokens per second", f"{trained.tokens_per_second:,.1f} ({how})")]
    if trained.plain_tokens_per_second is not None:
        plain = f"{trained.plain_tokens_per_second:,.1f} (speedup {trained.speedup:.2f}x)"
        rows.append(("plain decoding, tokens per second", plain))
    if trained.num_compared:
        same = f"{trained.num_matching:,} of {trained.num_compared:,}"
        margin = trained.largest_mismatch_margin
        if margin is not None:
            same += f" (at mismatches the target's logits differ by at most {margin:.1e})"
        rows.append(("texts equal to plain decoding", same))
    return rows


def offline_rows(summary: OfflineSummary) -> list[Row]:
    """Return the figures of all stages: one table, no row twice."""
    states, training, acceptance = summary.states, summary.training, summary.acceptance
    return [
        *(_without_seconds(hidden_states_rows(states)) if states else ()),
        *_without_seconds(train_rows(training)),
        *_evaluated(acceptance, summary.estimate),
        *([("seconds: hidden states", f"{states.seconds:.1f}")] if states else ()),
        ("seconds: training", f"{training.seconds:.1f}"),
        *_evaluation_seconds(acceptance),
        ("seconds: total", f"{summary.seconds:.1f}"),
    ]


def online_rows(summary: OnlineSummary) -> list[Row]:
    """Return the figures of all stages without a store."""
    training, acceptance = summary.training, summary.acceptance
    return [
        *_without_seconds(train_rows(training)),
        *_evaluated(acceptance),
        ("seconds: target and training", f"{training.seconds:.1f}"),
        *_evaluation_seconds(acceptance),
        ("seconds: total", f"{summary.seconds:.1f}"),
    ]


def _evaluated(
    acceptance: EvaluateSummary | None, estimate: EstimateSummary | None = None
) -> list[Row]:
    if acceptance is not None:
        return _without_seconds(evaluate_rows(acceptance))
    estimated = [] if estimate is None else _without_seconds(estimate_rows(estimate))
    return [("acceptance length", "not measured: the target is not decoded here"), *estimated]


def _evaluation_seconds(acceptance: EvaluateSummary | None) -> list[Row]:
    return [] if acceptance is None else [("seconds: evaluation", f"{acceptance.seconds:.1f}")]


def estimate_rows(summary: EstimateSummary) -> list[Row]:
    """Return estimated acceptance with its interval and its shares, one row per depth."""
    found = summary.estimate
    low, high = found.acceptance_interval
    depths = [
        (f"accepted at depth {depth}, if reached", _series([share], "{:.1%}"))
        for depth, share in enumerate(found.acceptance_by_depth, start=1)
    ]
    return [
        ("run", str(summary.run_path)),
        ("checkpoint", f"step {summary.checkpoint_step:,}"),
        ("held-out samples", f"{found.num_samples:,} of snapshot {summary.snapshot_id}"),
        ("rounds replayed", f"{found.num_rounds:,}"),
        ("acceptance length, estimated", length_text(found.acceptance_length, low, high)),
        *depths,
        ("answer tokens that the target would choose", f"{found.on_policy:.1%}"),
        ("seconds", f"{summary.seconds:.1f}"),
    ]


def where_a_run_is(run_path: Path) -> list[Row]:
    """Return where to see the curves of a run, and its report."""
    return [
        ("loss curves", f"tensorboard --logdir {run_path.parent}"),
        ("report", str(run_path / REPORT_NAME)),
    ]


def where_to_look(run_path: Path, engine: EvaluationEngine = "eyas") -> list[Row]:
    """Return what to open next; `engine` decoded."""
    curves, page = where_a_run_is(run_path)
    return [
        curves,
        ("full acceptance results", str(run_path / evaluation_name(engine))),
        ("Prefect UI", "make server, then http://127.0.0.1:4200"),
        page,
    ]


def _without_seconds(rows: Sequence[Row]) -> list[Row]:
    return [(name, value) for name, value in rows if name != "seconds"]


def _ratio(states: HiddenStatesSummary) -> str:
    return f"{states.stored_bytes / max(states.raw_bytes, 1):.1%}"


def _series(values: Sequence[float], form: str) -> str:
    return "  ".join("-" if math.isnan(value) else form.format(value) for value in values)


def _depths(report: AcceptanceReport) -> str:
    return _series(report.acceptance_by_depth, "{:.0%}")
