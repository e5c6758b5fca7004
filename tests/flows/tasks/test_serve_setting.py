"""Which setting `eyas serve` chooses, from what is given and what was measured."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import DraftSetting, EngineSpeed
from flows.reports.run_record import RunRecord
from flows.tasks import serve
from flows.tasks.serve import ServeOptions

RATES = {(2, 0.0): 9.0, (2, 0.5): 9.5, (3, 0.0): 7.0, (3, 0.75): 8.0}
"""Tokens per second by K and p_min; 10 without the draft."""


def speeds(plain: float) -> tuple[EngineSpeed, ...]:
    """Return what was measured with one and with four prompts at a time, 16 apart."""
    return tuple(
        EngineSpeed(
            setting=DraftSetting(draft_tokens=tokens, p_min=p_min),
            concurrency=concurrency,
            tokens_per_second=rate if concurrency == 4 else 1.0,
            plain_tokens_per_second=plain,
            num_matching=None,
            acceptance_length=1.5,
            prefill_share=0.0,
        )
        for (tokens, p_min), rate in RATES.items()
        for concurrency in (1, 4, 16)
    )


def chosen(
    monkeypatch: pytest.MonkeyPatch, plain: float | None = 10.0, **options: Any
) -> tuple[DraftSetting | None, str]:
    """Choose for llama.cpp, which has been measured unless `plain` is None."""
    summary = SimpleNamespace(
        evaluation=EvaluationConfig(engine="llamacpp"),
        checkpoint_step=7,
        engine=None if plain is None else SimpleNamespace(speeds=speeds(plain)),
    )
    record = SimpleNamespace(outdated=(), by_engine=(summary,))
    monkeypatch.setattr(RunRecord, "read", lambda _path: record)
    given = ServeOptions(engine="llamacpp", **options)
    return serve._setting(cast("Any", None), 7, "llamacpp", EvaluationConfig(), given)


def test_without_options_what_pays_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, reason = chosen(monkeypatch, plain=5.0)
    assert setting == DraftSetting(draft_tokens=2, p_min=0.5)
    assert reason == "measured with 4 prompts at a time: 2 drafted, p_min 0.5 (1.90x)"
    assert chosen(monkeypatch)[0] is None


@pytest.mark.parametrize(
    ("options", "expected", "why"),
    [
        ({"draft_tokens": 3}, (3, 0.75), "--draft-tokens; measured with 4 prompts"),
        ({"draft_tokens": 4}, (4, 0.0), "--draft-tokens; not measured with that"),
        ({"p_min": 0.0}, (2, 0.0), "--p-min; measured with 4 prompts at a time: 2 drafted (0.90x)"),
        ({"p_min": 0.75}, (3, 0.75), "--p-min; measured"),
        ({"p_min": 0.3}, (2, 0.3), "--p-min; not measured with that"),
        ({"p_min": 0.5, "draft_tokens": 3}, (3, 0.5), "--draft-tokens, --p-min; not measured"),
    ],
)
def test_what_is_given_is_served_even_if_it_does_not_pay(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    expected: tuple[int, float],
    why: str,
) -> None:
    setting, reason = chosen(monkeypatch, **options)
    assert setting == DraftSetting(draft_tokens=expected[0], p_min=expected[1])
    assert reason.startswith(why)


def test_what_is_given_counts_without_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, reason = chosen(monkeypatch, plain=None, p_min=0.5)
    assert setting == DraftSetting(draft_tokens=EvaluationConfig().draft_tokens, p_min=0.5)
    assert reason == "--p-min; not measured on llamacpp"
    assert chosen(monkeypatch, plain=None, draft_tokens=0) == (None, "--draft-tokens")
