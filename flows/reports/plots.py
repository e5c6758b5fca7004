"""Plots as SVG, embedded in an HTML page: no extra file, no script, no font to fetch.

Text stays text. The grey of the axes is readable on white and on black. Matplotlib is imported only
for drawing: it would add half a second to the start of every flow.
"""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

_GREY = "#808080"
_COLOURS = ("#2f7ea8", "#d9822b", "#3f9b5c", "#a0529c")
_INCHES = (6.4, 3.0)
_MOST_MARKERS = 12
_STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _GREY,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GREY,
    "grid.alpha": 0.25,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line or one group of bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    """NaN is skipped."""


def lines(
    series: Sequence[Series],
    *,
    name: str,
    x_label: str,
    y_label: str,
    share: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """Return a line plot; `share` labels the y axis in percent, `reference` is a level to reach."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 (see above)

    with _style(name):
        figure, axes = _axes(x_label, y_label, share=share)
        for colour, line in zip(_colours(len(series)), series, strict=True):
            marker = "o" if len(line.x) <= _MOST_MARKERS else ""
            axes.plot(line.x, line.y, color=colour, label=line.label, marker=marker, markersize=3)
        if reference is not None:
            label, level = reference
            axes.axhline(level, color=_GREY, linestyle="--", linewidth=1, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, len(series) + (reference is not None))
        return _svg(figure, name)


def bars(
    series: Sequence[Series], *, name: str, x_label: str, y_label: str, share: bool = False
) -> str:
    """Return bars side by side for every x."""
    width = 0.8 / max(len(series), 1)
    with _style(name):
        figure, axes = _axes(x_label, y_label, share=share)
        for number, (colour, group) in enumerate(zip(_colours(len(series)), series, strict=True)):
            places = [x + width * (number - (len(series) - 1) / 2) for x in group.x]
            axes.bar(places, group.y, width=width * 0.92, color=colour, label=group.label)
        axes.set_xticks(sorted({x for group in series for x in group.x}))
        axes.grid(visible=False, axis="x")
        _legend(figure, len(series))
        return _svg(figure, name)


def named_bars(
    values: Sequence[tuple[str, float]],
    *,
    name: str,
    x_label: str = "",
    form: Callable[[float], str],
) -> str:
    """Return horizontal bars, the first on top, each with its name and its value."""
    with _style(name):
        figure, axes = _axes(x_label, "", inches=(_INCHES[0], 0.7 + 0.38 * len(values)))
        labels, lengths = [label for label, _ in values], [value for _, value in values]
        drawn = axes.barh(labels, lengths, color=_colours(len(values)), height=0.62)
        axes.bar_label(drawn, labels=[f" {form(value)}" for value in lengths], color=_GREY)
        axes.xaxis.set_major_formatter(lambda value, _place: form(value))
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.grid(visible=False, axis="y")
        return _svg(figure, name)


def lengths(edges: Sequence[float], counts: Sequence[int]) -> str:
    """Return a histogram: `counts` [B] samples with a length between `edges` [B + 1] in tokens."""
    name = "Lengths"
    with _style(name):
        figure, axes = _axes("tokens per sample", "samples")
        axes.stairs(counts, edges, fill=True, color=_COLOURS[0])
        axes.grid(visible=False, axis="x")
        return _svg(figure, name)


def _style(name: str) -> AbstractContextManager[None]:
    import matplotlib as mpl  # noqa: PLC0415 (see above)

    # Ids of marks and clips are digests: with a salt, no two plots of a page share one.
    return mpl.rc_context({**_STYLE, "svg.hashsalt": name})


def _axes(
    x_label: str, y_label: str, *, share: bool = False, inches: tuple[float, float] = _INCHES
) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # noqa: PLC0415 (see above)
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415 (see above)

    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure, axes


def _svg(figure: "Figure", name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # identical in every plot, and unused
    text = re.sub(r'^(<svg [^>]*?) width="[^"]*"', r"\1", text, flags=re.DOTALL)
    text = re.sub(r'^(<svg [^>]*?) height="[^"]*"', r"\1", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _legend(figure: "Figure", num_labels: int) -> None:
    if num_labels > 1:
        figure.legend(loc="outside upper right", ncols=num_labels, columnspacing=1.2)


def _colours(count: int) -> list[str]:
    """Return distinct colours for a few series, a gradient for many, such as steps."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    import matplotlib as mpl  # noqa: PLC0415 (see above)
    from matplotlib.colors import to_hex  # noqa: PLC0415 (see above)

    graded = mpl.colormaps["viridis"](np.linspace(0.15, 0.95, count))
    return [to_hex(colour) for colour in graded]
