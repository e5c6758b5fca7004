"""What the evaluate flow writes down."""

import json

from eagle_core.acceptance import PromptResult, summarise
from eagle_core.speculative import GenerationTrace, VerificationRound
from flows.evaluate import to_json
from flows.summaries import EvaluateSummary


def test_the_result_is_strict_json_where_a_depth_was_never_reached() -> None:
    missed = VerificationRound(verified=3, accepted=0, gained=1)
    trace = GenerationTrace(tokens=(1, 2), rounds=(missed,), seconds=1.0, prefill_seconds=0.1)
    report = summarise([PromptResult(speculative=trace)], draft_tokens=3)
    text = to_json(EvaluateSummary(untrained=report, trained=report, seconds=1.0))
    assert "NaN" not in text
    assert json.loads(text)["trained"]["acceptance_by_depth"] == [0.0, None, None]
