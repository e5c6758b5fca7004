"""What is measured with an engine."""

import pytest
from pydantic import ValidationError

from eagle_core.decoding.config import TreeConfig
from eagle_core.evaluation.bench import BenchConfig, swept
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import DraftSetting
from eagle_core.evaluation.measure_engine import (
    concurrencies,
    draft_lengths,
    draft_settings,
    headline_setting,
    num_texts,
)


def test_one_prompt_at_a_time_is_always_measured_and_never_more_than_there_are() -> None:
    config = EvaluationConfig(concurrency=(16, 4, 4), draft_tokens=5, draft_lengths=(2, 5, 1))
    assert concurrencies(config, 10) == [1, 4, 10]
    assert concurrencies(config, 1) == [1]
    assert draft_lengths(config) == [1, 2, 5]
    assert num_texts(10, config) == (1 + 3) * 3 * 10


def test_each_p_min_is_measured_with_each_draft_length() -> None:
    config = EvaluationConfig(
        engine="llamacpp", draft_tokens=2, draft_lengths=(1,), draft_p_min=(0.5, 0.0, 0.5)
    )
    assert [(one.draft_tokens, one.p_min) for one in draft_settings(config)] == [
        *((1, 0.0), (1, 0.5)),
        *((2, 0.0), (2, 0.5)),
    ]
    assert headline_setting(config) == DraftSetting(draft_tokens=2)
    assert num_texts(3, config) == (1 + 4) * 2 * 3


@pytest.mark.parametrize("engine", ["eyas", "vllm"])
def test_p_min_is_refused_where_nothing_would_read_it(engine: str) -> None:
    with pytest.raises(ValidationError, match=r"draft_p_min is 0, 0.5, but only llama.cpp"):
        EvaluationConfig.model_validate({"engine": engine, "draft_p_min": (0, 0.5)})


def test_bench_sweeps_what_its_engine_has() -> None:
    evaluation = EvaluationConfig(num_prompts=7, draft_tokens=3)
    on_llamacpp = swept(BenchConfig(), evaluation, "llamacpp")
    assert on_llamacpp.num_prompts == 7
    assert on_llamacpp.draft_tokens == 3
    assert len(draft_settings(on_llamacpp)) == 5 * 3
    on_vllm = swept(BenchConfig(), evaluation, "vllm")
    assert on_vllm.engine == "vllm"
    assert {one.p_min for one in draft_settings(on_vllm)} == {0.0}


def test_bench_drafts_chains_where_evaluate_drafts_trees() -> None:
    evaluation = EvaluationConfig(tree=TreeConfig(depth=4, top_k=2, nodes=8))
    assert swept(BenchConfig(), evaluation, "vllm") == swept(
        BenchConfig(), EvaluationConfig(), "vllm"
    )


def test_bench_measures_no_draft_length_but_its_own() -> None:
    config = swept(BenchConfig(draft_lengths=(2, 1)), EvaluationConfig(draft_tokens=5), "vllm")
    assert draft_lengths(config) == [1, 2]
    assert headline_setting(config) == DraftSetting(draft_tokens=2)
