"""One HTML page for a run, made from the files in its folder; it can be mailed as it is.

Style, tables and SVG plots are embedded. There is no script, and nothing is fetched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eagle_core.atomic_files import write_text
from eagle_core.tracking.metrics_file import read_metrics
from flows.reports import plots
from flows.reports import rows as report
from flows.reports.engine_tables import has_lengths, speed_bars, speed_plot
from flows.reports.plots import Series
from flows.reports.run_record import (
    REPORT_NAME,
    RunRecord,
    RunSettings,
    SourceFigures,
    SplitFigures,
    StorageSize,
    as_text,
)
from flows.reports.table import Row
from flows.reports.units import human_bytes
from flows.summaries import EvaluateSummary

_MOST_POINTS = 500

Curves = Mapping[str, Series]
"""Name of a metric to its values by step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of the page."""

    title: str
    note: str = ""
    rows: Sequence[Row] = ()
    plots: Sequence[tuple[str, Markup]] = ()
    """Caption and SVG."""


def write_run_page(run_path: Path, curves: Curves | None = None) -> Path:
    """Write the report of the run in `run_path` from the files there, and return its path."""
    record = RunRecord.read(run_path)
    if curves is None:
        curves = read_curves(run_path)
    settings = record.settings
    environment = Environment(
        loader=PackageLoader("flows.reports", "pages"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("run.html").render(
        title=settings.title if settings else run_path.name,
        outdated=record.outdated,
        headlines=_headlines(record),
        sections=[
            _acceptance(record),
            *map(_engine, record.by_engine),
            _training(record, curves),
            _speed(record, curves),
            _data(settings),
            _storage(settings),
        ],
        configuration=_configuration(record),
    )
    path = run_path / REPORT_NAME
    write_text(path, page)
    return path


def read_curves(run_path: Path) -> Curves:
    """Return the metrics of a run, each thinned to a few hundred points."""
    found: dict[str, Series] = {}
    for tag, by_step in read_metrics(run_path).items():
        steps = list(by_step)
        kept = steps[:: math.ceil(len(steps) / _MOST_POINTS)]
        if kept[-1] != steps[-1]:
            kept.append(steps[-1])
        found[tag] = Series(label=tag, x=kept, y=[by_step[step] for step in kept])
    return found


def _headlines(record: RunRecord) -> list[Row]:
    """Return the most important figures, each with its name."""
    found: list[Row] = []
    if record.evaluation is not None:
        trained = record.evaluation.trained
        low, high = trained.acceptance_interval
        length = f"{trained.acceptance_length:.2f} ({low:.2f} to {high:.2f})"
        found.append(("tokens per target forward", length))
        if trained.speedup is not None:
            found.append(("speedup over plain decoding", f"{trained.speedup:.2f}x"))
    if record.training is not None:
        figures = record.training.figures
        found.append(("steps", f"{record.training.num_steps:,}"))
        found.append(("loss", f"{figures.first_loss:.2f} → {figures.loss:.2f}"))
    storage_size = record.settings.storage_size if record.settings else None
    if storage_size is not None and storage_size.raw_bytes:
        found.append(
            (
                "stored size relative to raw",
                f"{storage_size.stored_bytes / storage_size.raw_bytes:.1%}",
            )
        )
    return found


def loss_plot(curves: Curves) -> tuple[str, Markup] | None:
    """Return "Loss" and its plot over the steps, or None if no metrics were recorded."""
    return _curves(curves, {"loss": "loss"}, "Loss", "nats, weighted over TTT steps")


def acceptance_plot(found: EvaluateSummary) -> str:
    """Return bars of acceptance by depth: measured, and estimated from the store."""
    shares: dict[str, Sequence[float]] = {}
    if found.untrained is not None:
        shares["at the start"] = found.untrained.acceptance_by_depth
    shares["trained"] = found.trained.acceptance_by_depth
    if found.estimate is not None:
        shares["estimated from the store"] = found.estimate.acceptance_by_depth
    return plots.bars(
        [Series(label=label, x=_counted(each), y=each) for label, each in shares.items()],
        name="Acceptance by depth",
        x_label="drafted token",
        y_label="accepted, if reached",
        share=True,
    )


def _acceptance(record: RunRecord) -> Section:
    title, found, estimate = "Acceptance", record.evaluation, record.estimate
    if found is not None:
        caption = "Share of drafted tokens accepted at each depth, once reached"
        return Section(
            title=title,
            note="Measured by speculative decoding; 95 % intervals by bootstrap over prompts.",
            rows=_without_seconds(report.evaluate_rows(found)),
            plots=[
                (caption, Markup(acceptance_plot(found))),  # noqa: S704 (ours)
                *_benchmark_plots(found),
            ],
        )
    note = "Not measured yet: run the evaluate flow."
    if estimate is None:
        return Section(title=title, note=note)
    return Section(
        title=title,
        note=f"{note} Estimate from the stored states:",
        rows=_without_seconds(report.estimate_rows(estimate))[1:],
    )


def _benchmark_plots(found: EvaluateSummary) -> list[tuple[str, Markup]]:
    """Return bars of the acceptance length on each benchmark set; empty without any."""
    if found.benchmarks is None:
        return []
    bars = [(one.name, one.trained.acceptance_length) for one in found.benchmarks.sets]
    svg = plots.named_bars(
        [*bars, ("mean", found.benchmarks.mean.acceptance_length)],
        name="Acceptance by benchmark",
        x_label="tokens per target forward",
        form="{:.2f}".format,
    )
    return [("Acceptance length on each benchmark set", Markup(svg))]  # noqa: S704 (ours)


def _engine(found: EvaluateSummary) -> Section:
    """Return what one engine made of the draft, and its speed with and without it."""
    assert found.engine is not None  # noqa: S101
    if has_lengths(found.engine):
        caption = "Speed by draft length, relative to plain decoding in the same run"
        svg = speed_plot(found.engine)
    else:
        caption, svg = "The same prompts in the same run", speed_bars(found.engine)
    return Section(
        title=f"In {found.engine.engine}",
        note="Counted by the engine's own server, with the draft of step "
        f"{found.checkpoint_step:,} as it is exported.",
        rows=_without_seconds(report.evaluate_rows(found)),
        plots=[(caption, Markup(svg)), *_benchmark_plots(found)],  # noqa: S704 (ours)
    )


def _counted(values: Sequence[float]) -> list[float]:
    return [float(number) for number in range(1, len(values) + 1)]


def _training(record: RunRecord, curves: Curves) -> Section:
    if record.training is None and not curves:
        return Section(title="Training", note="Not finished yet: run the train flow.")
    drawn = [
        loss_plot(curves),
        _curves(curves, _stepped(curves, "loss/step_"), "Loss by TTT step", "nats"),
        _curves(
            curves,
            {
                "held_out/acceptance_length": "held out, joint prefix",
                "decoding/acceptance_length": "held out, decoded",
            },
            "Held-out acceptance length",
            "tokens per target forward",
        ),
        _curves(
            curves,
            _stepped(curves, "held_out/accuracy_"),
            "Held-out accuracy by TTT step",
            "draft and target agree",
            share=True,
        ),
        _curves(
            curves,
            _depths(curves, "decoding/acceptance_"),
            "Decoded acceptance by depth",
            "accepted, if reached",
            share=True,
        ),
    ]
    rows = [] if record.training is None else _without_seconds(report.train_rows(record.training))
    note = "" if curves else "No metrics were recorded (metrics.jsonl)."
    return Section(title="Training", note=note, rows=rows, plots=[plot for plot in drawn if plot])


def _stepped(curves: Curves, prefix: str) -> dict[str, str]:
    return {tag: f"step {tag.removeprefix(prefix)}" for tag in curves if tag.startswith(prefix)}


def _depths(curves: Curves, prefix: str) -> dict[str, str]:
    """Return metrics by depth, which count from 0, with labels that count drafted tokens from 1."""
    found = {tag: tag.removeprefix(prefix) for tag in curves if tag.startswith(prefix)}
    return {tag: f"token {int(depth) + 1}" for tag, depth in found.items() if depth.isdigit()}


def _curves(
    curves: Curves, labels: Mapping[str, str], caption: str, y_label: str, *, share: bool = False
) -> tuple[str, Markup] | None:
    series = [
        Series(label=label, x=curves[tag].x, y=curves[tag].y)
        for tag, label in labels.items()
        if tag in curves
    ]
    if not series:
        return None
    svg = plots.lines(series, name=caption, x_label="step", y_label=y_label, share=share)
    return caption, Markup(svg)  # noqa: S704 (ours)


def _speed(record: RunRecord, curves: Curves) -> Section:
    rows: list[Row] = []
    decoding: list[tuple[str, float]] = []
    if record.training is not None:
        rate = f"{record.training.tokens_per_second:,.0f}"
        rows.append(("training, tokens per second", rate))
        rows.append(("training, seconds", f"{record.training.seconds:,.1f}"))
    for tag, name, form in (
        ("data_wait_fraction", "training, share of the time spent waiting for data", "{:.1%}"),
        ("peak_memory_gib", "training, peak memory in GiB", "{:.2f}"),
    ):
        if tag in curves:
            rows.append((name, form.format(curves[tag].y[-1])))
    if record.evaluation is not None:
        trained = record.evaluation.trained
        decoding = [("speculative", trained.tokens_per_second)]
        if trained.plain_tokens_per_second is not None:
            decoding.insert(0, ("plain", trained.plain_tokens_per_second))
    if not rows and not decoding:
        return Section(title="Speed", note="Not measured yet.")
    drawn = []
    if decoding:
        svg = plots.named_bars(
            decoding, name="Decoding speed", x_label="tokens per second", form="{:,.4g}".format
        )
        drawn = [("Decoding the same prompts in the same run", Markup(svg))]  # noqa: S704 (ours)
    return Section(title="Speed", rows=rows, plots=drawn)


def _data(settings: RunSettings | None) -> Section:
    if settings is None:
        return Section(title="Data", note="Not recorded: run the train flow.")
    train = settings.train
    svg = plots.lengths(train.length_edges, train.length_counts)
    return Section(
        title="Data",
        rows=[
            ("samples to train on", _split(train)),
            ("held out", _split(settings.held_out)),
            *_source_rows(train.by_source, settings.held_out.by_source),
            ("source", settings.source_id),
        ],
        plots=[("Lengths of the samples to train on", Markup(svg))],  # noqa: S704 (ours)
    )


def _split(figures: SplitFigures) -> str:
    share = figures.num_supervised / max(figures.num_tokens, 1)
    return (
        f"{figures.num_samples:,}, with {figures.num_tokens:,} tokens, {figures.num_supervised:,} "
        f"of them supervised ({share:.1%})"
    )


def _source_rows(
    train: Mapping[str, SourceFigures], held_out: Mapping[str, SourceFigures]
) -> list[Row]:
    """Return what each of several sources gave, and its share of what is trained on."""
    total = max(sum(source.num_supervised for source in train.values()), 1)
    return [
        (f"of {name}", _of_source(source, source.num_supervised / total, held_out.get(name)))
        for name, source in train.items()
    ]


def _of_source(train: SourceFigures, share: float, held_out: SourceFigures | None) -> str:
    text = (
        f"{train.num_samples:,} samples to train on, with {train.num_supervised:,} supervised "
        f"tokens ({share:.1%} of all)"
    )
    if held_out is None:  # the sources were renamed since that file was made
        return text
    return f"{text}; held out: {held_out.num_samples:,}, with {held_out.num_supervised:,}"


def _storage(settings: RunSettings | None) -> Section:
    storage_size = settings.storage_size if settings else None
    if storage_size is None:
        note = "Nothing is stored: the target computed the states during training."
        return Section(title="Storage", note=note if settings else "Not recorded.")
    svg = plots.named_bars(
        [
            ("raw arrays", storage_size.raw_bytes),
            (f"stored, {storage_size.profile}", storage_size.stored_bytes),
        ],
        name="Storage size",
        form=human_bytes,
    )
    return Section(
        title="Storage",
        rows=_size_rows(storage_size),
        plots=[("Hidden states of both splits", Markup(svg))],  # noqa: S704 (ours)
    )


def _size_rows(size: StorageSize) -> list[Row]:
    tokens = max(size.num_tokens, 1)
    return [
        (
            "size, raw",
            f"{human_bytes(size.raw_bytes)}, {size.raw_bytes / tokens:,.0f} bytes per token",
        ),
        (
            "size, stored",
            f"{human_bytes(size.stored_bytes)}, {size.stored_bytes / tokens:,.0f} bytes per token",
        ),
        (
            "stored, share of raw",
            f"{size.stored_bytes / max(size.raw_bytes, 1):.1%}",
        ),
        ("profile", size.profile),
        ("shards", f"{size.num_shards:,}"),
        ("tokens", f"{size.num_tokens:,}"),
        ("store", size.root),
    ]


def _configuration(record: RunRecord) -> Mapping[str, Sequence[Row]]:
    sections = dict(record.settings.configuration) if record.settings else {}
    if record.evaluation is not None:
        sections["evaluation"] = record.evaluation.evaluation.model_dump(mode="json")
    return {
        section: [(key, as_text(value)) for key, value in values.items()]
        for section, values in sections.items()
    }


def _without_seconds(rows: Sequence[Row]) -> list[Row]:
    return [(name, value) for name, value in rows if name != "seconds"]
