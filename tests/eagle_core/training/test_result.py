"""What a run reports is read back, under former names too."""

from pydantic import TypeAdapter

from eagle_core.training.result import Metrics


def test_metrics_are_read_from_json_and_under_a_former_name() -> None:
    stored = {"loss": 1.0, "first_loss": 2.0, "held_out_prefixes": [0.5, 0.25]}
    metrics = TypeAdapter(Metrics).validate_python(stored)
    assert metrics.held_out_joint_prefix_accuracies == (0.5, 0.25)
    assert TypeAdapter(Metrics).validate_json(TypeAdapter(Metrics).dump_json(metrics)) == metrics
