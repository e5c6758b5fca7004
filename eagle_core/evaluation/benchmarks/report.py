"""Acceptance on each benchmark set, by turn and by category, and its mean over the sets."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from eagle_core.evaluation.acceptance import (
    AcceptanceReport,
    FloatOrNan,
    PromptResult,
    mean_interval,
    summarise,
)
from eagle_core.evaluation.benchmarks.sweep import ChosenSet, Sweep
from eagle_core.evaluation.prompts import Prompt

Key = TypeVar("Key", int, str)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkReport:
    """Acceptance on one set."""

    name: str
    source: str
    """What was read, exactly: a hub file with its commit, or a path with its digest."""
    num_questions: int
    num_without_text: int
    """Records without a text that were passed over, among those that were read."""
    left_out: dict[str, int]
    """Why turns were not asked, and how many of them."""
    untrained: AcceptanceReport | None
    """With the draft at the start; None if it was not measured."""
    trained: AcceptanceReport
    by_turn: dict[int, AcceptanceReport]
    """Empty if all prompts are first turns."""
    by_category: dict[str, AcceptanceReport]
    """Empty if all prompts are of one category."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanAcceptance:
    """Mean over the sets, each with the same weight."""

    acceptance_length: FloatOrNan
    acceptance_interval: tuple[FloatOrNan, FloatOrNan]
    """95 % bootstrap interval over the prompts of every set."""
    acceptance_by_depth: tuple[FloatOrNan, ...]
    """Mean over the sets that reached the depth; NaN where none did."""
    untrained_length: FloatOrNan | None
    speedup: float | None
    """None if no prompt of some set was decoded plainly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepReport:
    """Acceptance on all sets."""

    sets: tuple[BenchmarkReport, ...]
    mean: MeanAcceptance


def sweep_report(
    sweep: Sweep,
    prompts: Sequence[Prompt],
    before: Sequence[PromptResult],
    after: Sequence[PromptResult],
    *,
    draft_tokens: int,
) -> SweepReport:
    """Sum up the results of `prompts` by set; `before` may be empty."""
    sets = tuple(_report(one, prompts, before, after, draft_tokens) for one in sweep.sets)
    by_set = [_of(one.name, prompts, after) for one in sweep.sets]
    return SweepReport(sets=sets, mean=_mean(sets, by_set))


def _report(
    chosen: ChosenSet,
    prompts: Sequence[Prompt],
    before: Sequence[PromptResult],
    after: Sequence[PromptResult],
    draft_tokens: int,
) -> BenchmarkReport:
    own = [prompt for prompt in prompts if prompt.benchmark == chosen.name]
    results = _of(chosen.name, prompts, after)
    return BenchmarkReport(
        name=chosen.name,
        source=chosen.source,
        num_questions=len(chosen.dialogues.questions),
        num_without_text=chosen.num_without_text,
        left_out=dict(chosen.dialogues.left_out),
        untrained=summarise(_of(chosen.name, prompts, before), draft_tokens=draft_tokens)
        if before
        else None,
        trained=summarise(results, draft_tokens=draft_tokens),
        by_turn=_grouped(own, results, lambda prompt: prompt.turn, draft_tokens),
        by_category=_grouped(own, results, lambda prompt: prompt.category, draft_tokens),
    )


def _of(
    name: str, prompts: Sequence[Prompt], results: Sequence[PromptResult]
) -> list[PromptResult]:
    if not results:
        return []
    pairs = zip(prompts, results, strict=True)
    return [result for prompt, result in pairs if prompt.benchmark == name]


def _grouped(
    prompts: Sequence[Prompt],
    results: Sequence[PromptResult],
    key: Callable[[Prompt], Key],
    draft_tokens: int,
) -> dict[Key, AcceptanceReport]:
    """Return one report per key, in the order of the keys; empty if there is only one."""
    groups: dict[Key, list[PromptResult]] = {}
    for prompt, result in zip(prompts, results, strict=True):
        groups.setdefault(key(prompt), []).append(result)
    if len(groups) < 2:
        return {}
    return {name: summarise(groups[name], draft_tokens=draft_tokens) for name in sorted(groups)}


def _mean(
    sets: Sequence[BenchmarkReport], results: Sequence[Sequence[PromptResult]]
) -> MeanAcceptance:
    before = [one.untrained.acceptance_length for one in sets if one.untrained is not None]
    speedups = [one.trained.speedup for one in sets if one.trained.speedup is not None]
    depths = np.array([one.trained.acceptance_by_depth for one in sets])
    reached = ~np.isnan(depths)
    counts = reached.sum(axis=0)
    by_depth = np.full(depths.shape[1], np.nan)
    np.divide(np.nansum(depths, axis=0), counts, out=by_depth, where=counts > 0)
    return MeanAcceptance(
        acceptance_length=_average(one.trained.acceptance_length for one in sets),
        acceptance_interval=mean_interval(results),
        acceptance_by_depth=tuple(by_depth.tolist()),
        untrained_length=_average(before) if before else None,
        speedup=_average(speedups) if len(speedups) == len(sets) else None,
    )


def _average(values: Iterable[float]) -> float:
    return float(np.mean([*values]))
