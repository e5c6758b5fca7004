"""What the evaluate flow writes down."""

import json
import math
from dataclasses import replace
from pathlib import Path

from eagle_core.decoding.trace import GenerationTrace, VerificationRound
from eagle_core.evaluation.acceptance import PromptResult, summarise
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import (
    DraftSetting,
    EngineReport,
    EngineSpeed,
    SettingAcceptance,
)
from eagle_core.evaluation.prompts import Prompt
from eagle_core.target.config import TargetConfig
from eagle_core.target.positions import Positions
from flows.evaluate import inequality_warning, num_beyond
from flows.reports.rows import evaluate_rows
from flows.reports.run_page import write_run_page
from flows.reports.run_record import EVALUATION_NAME, RunRecord, evaluation_name, write_stage
from flows.summaries import EvaluateSummary


def test_the_result_is_strict_json_where_a_depth_was_never_reached(tmp_path: Path) -> None:
    missed = VerificationRound(verified=3, accepted=0, gained=1)
    trace = GenerationTrace(tokens=(1, 2), rounds=(missed,), seconds=1.0, prefill_seconds=0.1)
    report = summarise([PromptResult(speculative=trace)], draft_tokens=3)
    summary = EvaluateSummary(
        evaluation=EvaluationConfig(),
        checkpoint_step=3,
        untrained=report,
        trained=report,
        trained_by_group={"turn 1": report},
        estimate=None,
        seconds=1.0,
    )
    write_stage(tmp_path / EVALUATION_NAME, summary)
    text = (tmp_path / EVALUATION_NAME).read_text()
    assert "NaN" not in text
    assert json.loads(text)["trained"]["acceptance_by_depth"] == [0.0, None, None]

    found = RunRecord.read(tmp_path).evaluation
    assert found is not None
    assert found.trained.acceptance_by_depth[0] == 0
    assert all(map(math.isnan, found.trained.acceptance_by_depth[1:]))
    assert found.trained.plain_tokens_per_second is None


def _result(plain: tuple[int, ...], *, margin: float | None = None) -> PromptResult:
    missed = VerificationRound(verified=3, accepted=0, gained=1)
    traces = [
        GenerationTrace(tokens=tokens, rounds=(missed,), seconds=1.0, prefill_seconds=0.1)
        for tokens in ((1, 2), plain)
    ]
    return PromptResult(speculative=traces[0], plain=traces[1], mismatch_margin=margin)


def test_texts_that_differ_in_float32_are_no_figure_without_a_warning(target: TargetConfig) -> None:
    equal, other = _result((1, 2)), _result((1, 3), margin=0.25)
    assert inequality_warning(target, [equal], [equal]) == ""
    found = inequality_warning(target, [equal, equal], [equal, other])
    assert found.startswith("1 of 4 speculative texts of target tiny differ")
    assert "2.5e-01 apart" in found
    assert "eyas run estimate" in found
    half = target.model_copy(update={"dtype": "bfloat16"})
    assert inequality_warning(half, [other]) == ""
    report = summarise([other], draft_tokens=3)
    summary = EvaluateSummary(
        evaluation=EvaluationConfig(),
        checkpoint_step=3,
        untrained=report,
        trained=report,
        trained_by_group={},
        estimate=None,
        seconds=1.0,
        warning=found,
    )
    assert evaluate_rows(summary)[0] == ("warning", found)


def test_prompts_leave_room_for_their_answers() -> None:
    prompts = [Prompt(input_ids=(1,) * length) for length in (10, 60, 61, 128)]
    short = Positions(limit=128, is_scaled=False)
    assert num_beyond(prompts, short, 68) == (2, 60)
    assert num_beyond(prompts, short, 0) == (0, 128)
    assert num_beyond(prompts, Positions(limit=128, is_scaled=True), 68) == (0, 0)
    assert num_beyond(prompts, Positions(limit=None, is_scaled=False), 68) == (0, 0)


def test_what_an_engine_counts_stands_beside_the_own_figures(tmp_path: Path) -> None:
    accepted = VerificationRound(verified=3, accepted=3, gained=4)
    trace = GenerationTrace(
        tokens=(1, 2, 3, 4, 5), rounds=(accepted,), seconds=1.0, prefill_seconds=0.1
    )
    report = summarise([PromptResult(speculative=trace, plain=trace)], draft_tokens=3)
    speed = EngineSpeed(
        setting=DraftSetting(draft_tokens=3),
        concurrency=4,
        tokens_per_second=30.0,
        plain_tokens_per_second=20.0,
        num_matching=1,
        acceptance_length=4.0,
        prefill_share=0.1,
    )
    own = EvaluateSummary(
        evaluation=EvaluationConfig(),
        checkpoint_step=3,
        untrained=report,
        trained=report,
        trained_by_group={},
        estimate=None,
        seconds=1.0,
    )
    by_engine = replace(
        own,
        evaluation=EvaluationConfig(engine="vllm"),
        untrained=None,
        engine=EngineReport(
            engine="vLLM 0.32.0",
            dtype="float32",
            acceptances=(SettingAcceptance(setting=speed.setting, report=report),),
            speeds=(speed,),
        ),
    )
    write_stage(tmp_path / evaluation_name("eyas"), own)
    write_stage(tmp_path / evaluation_name("vllm"), by_engine)
    record = RunRecord.read(tmp_path)
    assert record.evaluation == own
    assert record.by_engine == (by_engine,)
    rows = dict(evaluate_rows(by_engine))
    assert rows["decoded by"] == "vLLM 0.32.0, float32"
    assert "acceptance length, at the start" not in rows
    assert rows["tokens per second, plain"] == "4 at a time: 20.0"
    assert rows["tokens per second, 3 drafted"] == "4 at a time: 30.0 (1.50x)"
    assert rows["texts equal to plain decoding"] == "4 at a time: 1 of 1"
    assert rows["serve with, 4 prompts at a time"] == "3 drafted (1.50x)"
    page = write_run_page(tmp_path).read_text()
    assert page.index("<h2>Acceptance</h2>") < page.index("<h2>In vLLM 0.32.0</h2>")
    assert "3 drafted, 4 at a time" in page
