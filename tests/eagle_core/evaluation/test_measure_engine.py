"""What is measured with an engine."""

from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.measure_engine import concurrencies, draft_lengths, num_texts


def test_one_prompt_at_a_time_is_always_measured_and_never_more_than_there_are() -> None:
    config = EvaluationConfig(concurrency=(16, 4, 4), draft_tokens=5, draft_lengths=(2, 5, 1))
    assert concurrencies(config, 10) == [1, 4, 10]
    assert concurrencies(config, 1) == [1]
    assert draft_lengths(config) == [1, 2, 5]
    assert num_texts(10, config) == (1 + 3) * 3 * 10
