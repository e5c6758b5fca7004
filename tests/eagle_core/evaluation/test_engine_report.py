"""From which acceptance length a draft pays, and what to serve with."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_core.evaluation.engine_report import (
    DraftSetting,
    EngineReport,
    EngineSpeed,
    break_even_length,
)

NUM_TOKENS = 120


def speed(
    draft_tokens: int, rate: float, *, concurrency: int = 1, p_min: float = 0.0, plain: float = 10.0
) -> EngineSpeed:
    return EngineSpeed(
        setting=DraftSetting(draft_tokens=draft_tokens, p_min=p_min),
        concurrency=concurrency,
        tokens_per_second=rate,
        plain_tokens_per_second=plain,
        num_matching=None,
        acceptance_length=2.0,
        prefill_share=0.0,
    )


def report(*speeds: EngineSpeed) -> EngineReport:
    return EngineReport(engine="test", dtype="float32", acceptances=(), speeds=speeds)


@given(
    round_seconds=st.floats(0.5, 8),
    length=st.floats(1, 6),
    prefill=st.floats(0, 30),
    draft_prefill=st.floats(0, 5),
)
def test_a_draft_of_the_break_even_length_is_as_fast_as_plain_decoding(
    round_seconds: float, length: float, prefill: float, draft_prefill: float
) -> None:
    """On a machine whose plain forward takes a second, and a round `round_seconds`."""

    def drafted_seconds(acceptance: float) -> float:
        return prefill + draft_prefill + NUM_TOKENS / acceptance * round_seconds

    plain_seconds, measured = prefill + NUM_TOKENS, drafted_seconds(length)
    found = break_even_length(
        length,
        speedup=plain_seconds / measured,
        prefill_share=(prefill + draft_prefill) / measured,
    )
    assert drafted_seconds(found) == pytest.approx(plain_seconds)
    assert (found <= length) == (measured <= plain_seconds) or found == pytest.approx(length)


def test_without_prefill_it_is_the_length_over_the_speedup() -> None:
    assert break_even_length(3.0, speedup=1.5) == 2.0
    assert speed(4, 8.0).pays_from == 2.0 / 0.8


def test_prefill_that_takes_as_long_as_plain_decoding_never_pays() -> None:
    assert break_even_length(3.0, speedup=0.4, prefill_share=0.5) == math.inf


def test_without_a_round_nothing_is_known() -> None:
    assert math.isnan(break_even_length(math.nan, speedup=1.5))


def test_the_fastest_setting_of_each_concurrency_is_the_best_even_if_it_is_slower_than_plain() -> (
    None
):
    found = report(
        speed(1, 12.0),
        speed(1, 16.0, concurrency=4, plain=20.0),
        speed(2, 14.0),
        speed(2, 14.0, p_min=0.5),
        speed(2, 15.0, concurrency=4, plain=20.0),
    ).best()
    assert {number: one.setting for number, one in found.items()} == {
        1: DraftSetting(draft_tokens=2),
        4: DraftSetting(draft_tokens=1),
    }
    assert found[4].speedup < 1 < found[1].speedup
