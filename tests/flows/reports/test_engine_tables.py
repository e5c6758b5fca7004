"""The table and the plot of what an engine made of a draft."""

from dataclasses import replace

from eagle_core.decoding.trace import GenerationTrace, VerificationRound
from eagle_core.evaluation.acceptance import PromptResult, summarise
from eagle_core.evaluation.engine_report import (
    DraftSetting,
    EngineReport,
    EngineSpeed,
    SettingAcceptance,
)
from flows.reports.engine_tables import engine_rows, has_lengths, speed_plot

RATES = {
    (1, 0.0): (12.0, 18.0),
    (1, 0.5): (11.0, 17.0),
    (2, 0.0): (8.0, 10.0),
    (2, 0.5): (16.0, 19.0),
}
"""(K, p_min) to tokens per second of 1 and of 4 prompts at a time."""
PLAIN = {1: 10.0, 4: 20.0}


def swept() -> EngineReport:
    """Return a report in which rounds take nothing but time, and accept two tokens."""
    accepted = VerificationRound(verified=1, accepted=1, gained=2)
    trace = GenerationTrace(tokens=(1, 2, 3), rounds=(accepted,), seconds=1.0, prefill_seconds=0.0)
    settings = [DraftSetting(draft_tokens=k, p_min=p_min) for k, p_min in RATES]
    return EngineReport(
        engine="test",
        dtype="float32",
        acceptances=tuple(
            SettingAcceptance(
                setting=one,
                report=summarise(
                    [PromptResult(speculative=trace, plain=trace)], draft_tokens=one.draft_tokens
                ),
            )
            for one in settings
        ),
        speeds=tuple(
            EngineSpeed(
                setting=one,
                concurrency=concurrency,
                tokens_per_second=rate,
                plain_tokens_per_second=PLAIN[concurrency],
                num_matching=1,
                acceptance_length=2.0,
                prefill_share=0.0,
            )
            for one in settings
            for concurrency, rate in zip((1, 4), RATES[one.draft_tokens, one.p_min], strict=True)
        ),
    )


def test_the_table_says_what_to_serve_with_and_from_where_the_draft_pays() -> None:
    rows = dict(engine_rows(swept()))
    assert rows["tokens per second, plain"] == "1 at a time: 10.0; 4 at a time: 20.0"
    assert rows["tokens per second, 2 drafted, p_min 0.5"] == (
        "1 at a time: 16.0 (1.60x); 4 at a time: 19.0 (0.95x)"
    )
    assert rows["serve with, 1 prompt at a time"] == "2 drafted, p_min 0.5 (1.60x)"
    assert rows["serve with, 4 prompts at a time"] == (
        "without the draft (at best 0.95x, with 2 drafted, p_min 0.5)"
    )
    assert rows["pays from, 1 prompt at a time"] == (
        "acceptance length, 1 drafted: 1.67 (has 2.00); 2 drafted: 2.50 (has 2.00)"
    )
    assert rows["texts equal to plain decoding"] == "1 at a time: 4 of 4; 4 at a time: 4 of 4"
    assert "other load" in rows["speeds"]
    assert "2 drafted: 4.00, out of reach (has 2.00)" in rows["pays from, 4 prompts at a time"]


def test_a_round_that_is_cheaper_than_a_plain_forward_shows_that_the_machine_was_busy() -> None:
    found = swept()
    fast = replace(found.speeds[0], tokens_per_second=25.0)  # two accepted tokens: at most 20
    rows = dict(engine_rows(replace(found, speeds=(fast, *found.speeds[1:]))))
    assert rows["speeds"].startswith("not to be relied on: by 1 of 8")


def test_the_plot_has_a_line_for_each_concurrency_and_plain_decoding() -> None:
    found = swept()
    assert has_lengths(found)
    svg = speed_plot(found)
    for label in ("1 prompt at a time", "4 prompts at a time", "plain decoding"):
        assert f">{label}<" in svg
