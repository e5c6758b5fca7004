"""The counters of vLLM and of llama.cpp, which have the same names."""

import httpx
import numpy as np
import pytest

from eagle_core.decoding.trace import VerificationRound
from eagle_core.serving.round_counts import RoundCounts

METRICS = """\
# HELP {engine}:spec_decode_num_drafts_total Rounds
# TYPE {engine}:spec_decode_num_drafts_total counter
{engine}:spec_decode_num_drafts_total{labels} 5.0
# HELP {engine}:spec_decode_num_accepted_tokens_per_pos_total Accepted
# TYPE {engine}:spec_decode_num_accepted_tokens_per_pos_total counter
{engine}:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} 3.0
{engine}:spec_decode_num_accepted_tokens_per_pos_total{{position="1"}} 1.0
"""


@pytest.mark.parametrize(("engine", "labels"), [("vllm", '{model_name="tiny"}'), ("llamacpp", "")])
def test_counts_become_rounds(engine: str, labels: str) -> None:
    text = METRICS.format(engine=engine, labels=labels)
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, text=text))
    with httpx.Client(base_url="http://engine", transport=transport) as client:
        counts = RoundCounts.read(client, draft_tokens=2)
    none = RoundCounts(rounds=1, accepted=np.array([1, 0]))
    assert counts.num_accepted == 4
    assert counts.since(none).as_rounds() == [
        VerificationRound(verified=2, accepted=0, gained=1),
        VerificationRound(verified=2, accepted=0, gained=1),
        VerificationRound(verified=2, accepted=1, gained=2),
        VerificationRound(verified=2, accepted=2, gained=3),
    ]
