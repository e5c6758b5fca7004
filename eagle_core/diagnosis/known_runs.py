"""Acceptance lengths of known runs by the training tokens that they had seen.

All are of one small target, SmolLM2-135M, on a CPU: held-out length from joint prefixes, greedy.
Whose answers they are and how the draft started decide which of them a run is compared with.
`docs/guides/low-acceptance.md` has the table with settings and sources.
"""

from dataclasses import dataclass

import numpy as np

MEASURED_ON = "SmolLM2-135M"
_SLACK = 0.6
"""Part of the smallest known gain per forward above which a run counts as usual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownRun:
    """One run: its data, its first weights and its held-out lengths."""

    has_own_answers: bool
    """Whether the target wrote the answers."""
    is_solved: bool
    """Whether it started from solved weights; else from random ones."""
    num_data_tokens: int
    points: tuple[tuple[int, float], ...]
    """(training tokens seen, tokens per target forward), ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What known runs had after as many tokens."""

    length: float
    """Of the run that is most alike."""
    lowest: float
    """Below this, something else than the number of tokens is at fault."""
    most_tokens: int
    """That the run which is most alike has seen; beyond them its last figure stands."""
    most_length: float
    """What it had then."""


KNOWN_RUNS = (
    KnownRun(  # docs/benchmarks/start.md, long runs: ShareGPT's answers, three seeds
        has_own_answers=False,
        is_solved=True,
        num_data_tokens=229_153,
        points=(
            *((0, 1.331), (30_720, 1.287), (61_440, 1.304), (128_000, 1.334), (256_000, 1.378)),
            *((512_000, 1.468), (1_024_000, 1.530)),
        ),
    ),
    KnownRun(
        has_own_answers=False,
        is_solved=False,
        num_data_tokens=229_153,
        points=(
            *((0, 1.001), (30_720, 1.137), (61_440, 1.211), (128_000, 1.258), (256_000, 1.317)),
            *((512_000, 1.416), (1_024_000, 1.491)),
        ),
    ),
    KnownRun(  # docs/guides/low-acceptance.md: 581 conversations that the target answered, one seed
        has_own_answers=True,
        is_solved=True,
        num_data_tokens=361_468,
        points=((0, 1.42), (225_280, 1.516), (450_560, 1.617), (675_840, 1.717), (901_120, 1.776)),
    ),
    KnownRun(
        has_own_answers=True,
        is_solved=False,
        num_data_tokens=361_468,
        points=((0, 1.0), (225_280, 1.294), (450_560, 1.473), (675_840, 1.613), (901_120, 1.632)),
    ),
)


def expected_after(num_tokens: int, *, has_own_answers: bool, is_solved: bool) -> Expectation:
    """Return what known runs with such answers had after `num_tokens` training tokens."""
    alike = [run for run in KNOWN_RUNS if run.has_own_answers == has_own_answers]
    (nearest,) = (run for run in alike if run.is_solved == is_solved)
    return Expectation(
        length=_length(nearest, num_tokens),
        lowest=1 + _SLACK * (min(_length(run, num_tokens) for run in alike) - 1),
        most_tokens=nearest.points[-1][0],
        most_length=nearest.points[-1][1],
    )


def _length(run: KnownRun, num_tokens: int) -> float:
    tokens, lengths = zip(*run.points, strict=True)
    return float(np.interp(num_tokens, tokens, lengths))
