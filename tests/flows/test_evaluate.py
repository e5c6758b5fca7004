"""What the evaluate flow writes down."""

import json
import math
from pathlib import Path

from eagle_core.decoding.trace import GenerationTrace, VerificationRound
from eagle_core.evaluation.acceptance import PromptResult, summarise
from eagle_core.evaluation.config import EvaluationConfig
from flows.reports.run_record import EVALUATION_NAME, RunRecord, write_stage
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
