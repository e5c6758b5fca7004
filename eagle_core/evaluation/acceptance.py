"""Acceptance metrics from the traces of real speculative decoding: pure aggregation.

Acceptance length is the mean number of tokens per verifying forward of the target: the accepted
drafted tokens and the target's own one. Plain decoding has 1; the maximum is K + 1. Intervals are
bootstrapped over prompts, not over rounds: rounds of one text are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from eagle_core.decoding.trace import GenerationTrace, VerificationRound
from eagle_core.errors import ConfigError

_RESAMPLES = 2000
_INTERVAL = (0.025, 0.975)

FloatOrNan = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that may be undefined; null in JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResult:
    """One prompt, decoded speculatively and, if requested, plainly."""

    speculative: GenerationTrace
    plain: GenerationTrace | None = None
    sampled: bool = False
    """Whether tokens were sampled: then the two texts need not be the same."""
    category: str = ""
    """Group of the prompt in reports; empty for none."""
    mismatch_margin: float | None = None
    """Gap between the target's logits of the two tokens where the texts first differ. About 1e-4
    or less is a tie broken by rounding; more is a bug."""

    @property
    def matches_plain(self) -> bool:
        """Whether both texts are the same tokens; False where there is no plain one."""
        return self.plain is not None and self.plain.tokens == self.speculative.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceReport:
    """The result of one evaluation."""

    num_prompts: int
    num_tokens: int
    """Tokens generated speculatively."""
    num_rounds: int
    """Verifying forwards of the target, prefills not counted."""
    acceptance_length: FloatOrNan
    """Mean tokens per verifying forward, 1..K+1; NaN without any round."""
    acceptance_interval: tuple[FloatOrNan, FloatOrNan]
    """95 % bootstrap interval over prompts."""
    acceptance_by_depth: tuple[FloatOrNan, ...]
    """[K] P(drafted token i is accepted | the tokens before it were); NaN where never reached."""
    acceptance_to_depth: tuple[float, ...]
    """[K] P(drafted tokens 1..i are all accepted): the running product of the above, which
    corrects for rounds that a stop token ended early; 0 at depths never reached."""
    tokens_per_second: float
    """Speculative decoding, prefill included, over the prompts decoded both ways (or over all)."""
    plain_tokens_per_second: float | None
    """Plain decoding of the same prompts in the same run; None if none was decoded plainly."""
    num_compared: int
    """Prompts whose text was compared with plain decoding: greedy ones, decoded both ways."""
    num_matching: int
    """Of these, the prompts with the same tokens."""
    largest_mismatch_margin: float | None
    """The largest logit margin at a first difference; None when every text matches."""

    @property
    def matches_plain(self) -> bool:
        """Whether every compared text equals the target's plain decoding."""
        return self.num_matching == self.num_compared

    @property
    def speedup(self) -> float | None:
        """Speculative over plain tokens per second."""
        if self.plain_tokens_per_second is None:
            return None
        return self.tokens_per_second / self.plain_tokens_per_second


def summarise(
    results: Sequence[PromptResult], *, draft_tokens: int, seed: int = 0
) -> AcceptanceReport:
    """Return the report of `results`, with `draft_tokens` (K) drafted per round."""
    if not results:
        raise ConfigError("nothing to report: no prompt was evaluated; give at least one")
    traces = [result.speculative for result in results]
    gained, rounds = _gained_per_round(results)
    by_depth = depth_acceptance(traces, draft_tokens=draft_tokens)
    timed = [result for result in results if result.plain is not None]
    compared = [result for result in timed if not result.sampled]
    margins = [r.mismatch_margin for r in compared if r.mismatch_margin is not None]
    return AcceptanceReport(
        num_prompts=len(results),
        num_tokens=sum(len(trace.tokens) for trace in traces),
        num_rounds=int(rounds.sum()),
        acceptance_length=_ratio(gained.sum(), rounds.sum()),
        acceptance_interval=bootstrap_ratio(gained, rounds, seed=seed),
        acceptance_by_depth=tuple(by_depth.tolist()),
        acceptance_to_depth=tuple(np.cumprod(np.nan_to_num(by_depth)).tolist()),
        tokens_per_second=_speed([result.speculative for result in timed or results]),
        plain_tokens_per_second=_speed([r.plain for r in timed if r.plain]) if timed else None,
        num_compared=len(compared),
        num_matching=sum(result.matches_plain for result in compared),
        largest_mismatch_margin=max(margins, default=None),
    )


def summarise_by_category(
    results: Sequence[PromptResult], *, draft_tokens: int
) -> dict[str, AcceptanceReport]:
    """Return one report per category, in alphabetical order."""
    return {
        category: summarise(
            [result for result in results if result.category == category],
            draft_tokens=draft_tokens,
        )
        for category in sorted({result.category for result in results})
    }


def depth_acceptance(
    traces: Sequence[GenerationTrace], *, draft_tokens: int
) -> NDArray[np.float64]:
    """Return [K] the share of drafted tokens at each depth that were accepted once reached."""
    rounds = [verification for trace in traces for verification in trace.rounds]
    reached, accepted = depth_counts(rounds, draft_tokens=draft_tokens)
    shares = np.full(draft_tokens, np.nan)
    np.divide(accepted, reached, out=shares, where=reached > 0)
    return shares


def depth_counts(
    rounds: Sequence[VerificationRound], *, draft_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ([K] rounds that reached each depth with a verdict, [K] that accepted there)."""
    reached = np.zeros(draft_tokens, dtype=np.int64)
    accepted = np.zeros(draft_tokens, dtype=np.int64)
    for verification in rounds:
        accepted[: verification.accepted] += 1
        reached[: min(verification.accepted + 1, verification.verified)] += 1
    return reached, accepted


def bootstrap_ratio(
    numerators: NDArray[np.int64], denominators: NDArray[np.int64], *, seed: int
) -> tuple[float, float]:
    """Return the 95 % percentile interval of sum/sum when the pairs are drawn with replacement."""
    return _interval(_drawn_ratios(numerators, denominators, np.random.default_rng(seed)))


def mean_interval(groups: Sequence[Sequence[PromptResult]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean acceptance length of groups of equal weight.

    The prompts of each group are drawn with replacement, independently of the other groups.
    """
    rng = np.random.default_rng(0)
    drawn = [_drawn_ratios(*_gained_per_round(group), rng) for group in groups]
    return _interval(np.mean(drawn, axis=0))


def _gained_per_round(
    results: Sequence[PromptResult],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens and the rounds of each prompt."""
    traces = [result.speculative for result in results]
    gained = [sum(verification.gained for verification in trace.rounds) for trace in traces]
    rounds = [len(trace.rounds) for trace in traces]
    return np.array(gained, dtype=np.int64), np.array(rounds, dtype=np.int64)


def _drawn_ratios(
    numerators: NDArray[np.int64], denominators: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return sum/sum of each resample; NaN where nothing was drawn to divide by."""
    drawn = rng.integers(0, len(numerators), size=(_RESAMPLES, len(numerators)))
    sums = denominators[drawn].sum(axis=1)
    ratios = np.full(_RESAMPLES, np.nan)
    np.divide(numerators[drawn].sum(axis=1), sums, out=ratios, where=sums > 0)
    return ratios


def _interval(ratios: NDArray[np.float64]) -> tuple[float, float]:
    usable = ratios[~np.isnan(ratios)]
    if not len(usable):
        return (float("nan"), float("nan"))
    low, high = np.quantile(usable, _INTERVAL)
    return (float(low), float(high))


def _ratio(numerator: int, denominator: int) -> float:
    return float(numerator / denominator) if denominator else float("nan")


def _speed(traces: Sequence[GenerationTrace]) -> float:
    return sum(len(trace.tokens) for trace in traces) / sum(trace.seconds for trace in traces)
