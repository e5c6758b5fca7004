"""A run that has a checkpoint, for the stages after training."""

from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from flows.bridge.run import Run
from flows.tasks.trained_run import _stop_ids


def test_an_answer_ends_where_the_run_recorded_it_and_where_the_target_says_so_now(
    target: TargetConfig,
) -> None:
    now = conversation_tokenizer(target).stop_ids
    recorded = Run.model_construct(stop_ids=(300,))  # by a version that read fewer files
    assert _stop_ids(recorded, target) == now | {300}
    assert _stop_ids(None, target) == now
