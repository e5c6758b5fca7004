"""What an engine made of a draft, as table rows and as a plot: speeds, and what to serve with."""

import math
from collections.abc import Callable, Sequence

from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.engine_report import DraftSetting, EngineReport, EngineSpeed
from flows.reports import plots
from flows.reports.plots import Series
from flows.reports.table import Row

NOTE = "only compared within this run: other load on the machine meanwhile makes them wrong"


def engine_rows(found: EngineReport) -> list[Row]:
    """Return acceptance and speed by setting, what to serve with, and from where a draft pays."""
    rows: list[Row] = []
    if len(found.acceptances) > 1:
        rows += [
            (f"acceptance length, {setting_text(one.setting)}", acceptance_text(one.report))
            for one in found.acceptances
        ]
    rows += [
        ("tokens per second, plain", _joined(_first_of_each(found), _plain)),
        *(
            (f"tokens per second, {setting_text(one.setting)}", _speeds(found, one.setting))
            for one in found.acceptances
        ),
    ]
    if all(one.num_matching is not None for one in found.speeds):
        rows.append(("texts equal to plain decoding", _equal_texts(found)))
    for concurrency, best in found.best().items():
        together = concurrency_text(concurrency)
        rows.append((f"serve with, {together}", serve_text(best)))
        rows.append((f"pays from, {together}", _pays_from(found, concurrency)))
    return [*rows, ("speeds", _impossible(found) or NOTE)]


def setting_text(setting: DraftSetting) -> str:
    """Return a setting as tables name it, such as `3 drafted, p_min 0.5`."""
    p_min = f", p_min {setting.p_min:g}" if setting.p_min else ""
    return f"{setting.draft_tokens} drafted{p_min}"


def serve_text(best: EngineSpeed) -> str:
    """Return the fastest setting, or that none is faster than plain decoding."""
    what, speedup = setting_text(best.setting), f"{best.speedup:.2f}x"
    if best.speedup > 1:
        return f"{what} ({speedup})"
    return f"without the draft (at best {speedup}, with {what})"


def concurrency_text(concurrency: int) -> str:
    """Return a number of prompts at a time in words."""
    return "1 prompt at a time" if concurrency == 1 else f"{concurrency} prompts at a time"


def acceptance_text(report: AcceptanceReport) -> str:
    """Return the acceptance length with its interval."""
    return length_text(report.acceptance_length, *report.acceptance_interval)


def length_text(length: float, low: float, high: float) -> str:
    """Return an acceptance length with its interval."""
    return f"{length:.2f} tokens per target forward (95 %: {low:.2f} to {high:.2f})"


def speed_plot(found: EngineReport) -> str:
    """Return the speedup by draft length, one line for each number of prompts at a time.

    Of several p_min, the fastest counts at each draft length.
    """
    return plots.lines(
        [_line(found, concurrency) for concurrency in found.best()],
        name="Speedup by draft length",
        x_label="drafted tokens per round",
        y_label="tokens per second, plain = 1",
        reference=("plain decoding", 1.0),
    )


def speed_bars(found: EngineReport) -> str:
    """Return the tokens per second of plain decoding, and of each setting."""
    plain = [
        (f"plain, {one.concurrency} at a time", one.plain_tokens_per_second)
        for one in _first_of_each(found)
    ]
    drafted = [
        (f"{setting_text(one.setting)}, {one.concurrency} at a time", one.tokens_per_second)
        for one in found.speeds
    ]
    return plots.named_bars(
        [*plain, *drafted],
        name="Decoding speed",
        x_label="tokens per second",
        form="{:,.4g}".format,
    )


def has_lengths(found: EngineReport) -> bool:
    """Return whether several draft lengths were measured."""
    return len({one.setting.draft_tokens for one in found.speeds}) > 1


def _line(found: EngineReport, concurrency: int) -> Series:
    best: dict[int, float] = {}
    for one in found.speeds:
        if one.concurrency == concurrency:
            length = one.setting.draft_tokens
            best[length] = max(best.get(length, 0.0), one.speedup)
    return Series(label=concurrency_text(concurrency), x=list(best), y=list(best.values()))


def _first_of_each(found: EngineReport) -> list[EngineSpeed]:
    """Return one speed for each concurrency: all of them have the same plain speed."""
    return list({one.concurrency: one for one in found.speeds}.values())


def _speeds(found: EngineReport, setting: DraftSetting) -> str:
    return _joined([one for one in found.speeds if one.setting == setting], _drafted)


def _pays_from(found: EngineReport, concurrency: int) -> str:
    """Return the acceptance lengths that this machine asks for, beside those of the draft.

    Of several p_min only the smallest: how much the others draft depends on the draft.
    """
    p_min = min(one.setting.p_min for one in found.speeds)
    lengths = [
        f"{one.setting.draft_tokens} drafted: {_break_even(one)} (has {one.acceptance_length:.2f})"
        for one in found.speeds
        if one.concurrency == concurrency and one.setting.p_min == p_min
    ]
    return f"acceptance length, {'; '.join(lengths)}"


def _break_even(speed: EngineSpeed) -> str:
    if math.isinf(speed.pays_from):
        return "never"
    is_reachable = not speed.pays_from > speed.setting.draft_tokens + 1
    return f"{speed.pays_from:.2f}{'' if is_reachable else ', out of reach'}"


def _impossible(found: EngineReport) -> str:
    """Return that speeds cannot be right, if so."""
    if not found.num_impossible:
        return ""
    return (
        f"not to be relied on: by {found.num_impossible} of {len(found.speeds)}, a round with a "
        "draft takes less time than a plain forward. Measure again while the machine does nothing "
        "else"
    )


def _equal_texts(found: EngineReport) -> str:
    """Return how many texts of all settings are those of plain decoding."""

    def counted(one: EngineSpeed) -> str:
        same = [each for each in found.speeds if each.concurrency == one.concurrency]
        total = sum(found.acceptance(each.setting).num_prompts for each in same)
        return f"{sum(each.num_matching or 0 for each in same):,} of {total:,}"

    return _joined(_first_of_each(found), counted)


def _joined(speeds: Sequence[EngineSpeed], form: Callable[[EngineSpeed], str]) -> str:
    return "; ".join(f"{one.concurrency} at a time: {form(one)}" for one in speeds)


def _plain(speed: EngineSpeed) -> str:
    return f"{speed.plain_tokens_per_second:,.1f}"


def _drafted(speed: EngineSpeed) -> str:
    return f"{speed.tokens_per_second:,.1f} ({speed.speedup:.2f}x)"
