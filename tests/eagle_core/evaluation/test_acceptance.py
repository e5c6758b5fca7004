"""From traces to figures, by hand-made traces whose figures are known."""

import math

import pytest
from numpy import array

from eagle_core.decoding.trace import GenerationTrace, VerificationRound
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import PromptResult, bootstrap_ratio, summarise


def trace(*accepted: int, drafted: int = 3, tokens: tuple[int, ...] = (1, 2)) -> GenerationTrace:
    """Return a trace whose rounds accepted so many of `drafted` tokens."""
    rounds = tuple(
        VerificationRound(verified=drafted, accepted=count, gained=count + 1) for count in accepted
    )
    return GenerationTrace(tokens=tokens, rounds=rounds, seconds=2.0, prefill_seconds=0.5)


def test_acceptance_length_is_tokens_per_verifying_forward() -> None:
    report = summarise(
        [PromptResult(speculative=trace(0, 3)), PromptResult(speculative=trace(1, 1))],
        draft_tokens=3,
    )
    assert report.acceptance_length == pytest.approx((1 + 4 + 2 + 2) / 4)
    assert report.num_rounds == 4
    assert report.acceptance_by_depth == pytest.approx((3 / 4, 1 / 3, 1 / 1))
    assert report.acceptance_to_depth == pytest.approx((3 / 4, 1 / 4, 1 / 4))
    low, high = report.acceptance_interval
    assert 1 <= low <= report.acceptance_length <= high <= 4


def test_a_draft_that_never_hits_has_length_one_and_unreached_depths() -> None:
    report = summarise([PromptResult(speculative=trace(0, 0, 0))], draft_tokens=3)
    assert report.acceptance_length == 1.0
    assert report.acceptance_by_depth[0] == 0
    assert math.isnan(report.acceptance_by_depth[1])
    assert report.acceptance_to_depth == (0, 0, 0)


def test_texts_that_differ_are_counted() -> None:
    same = PromptResult(speculative=trace(1), plain=trace())
    other = PromptResult(speculative=trace(1), plain=trace(tokens=(1, 3)), mismatch_margin=2e-5)
    report = summarise([same, other], draft_tokens=3)
    assert (report.num_compared, report.num_matching) == (2, 1)
    assert not report.matches_plain
    assert report.largest_mismatch_margin == 2e-5


def test_the_interval_narrows_with_more_prompts() -> None:
    few = bootstrap_ratio(array([3, 9]), array([3, 3]), seed=0)
    many = bootstrap_ratio(array([3, 9] * 50), array([3, 3] * 50), seed=0)
    assert many[1] - many[0] < few[1] - few[0]


def test_nothing_evaluated_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no prompt was evaluated"):
        summarise([], draft_tokens=3)
