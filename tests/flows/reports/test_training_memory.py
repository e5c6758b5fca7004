"""What `plan` says of the memory that training needs."""

import pytest

from eagle_core.training.config import TrainingConfig
from eagle_core.training.step_memory import TrainingMemory
from flows.reports.training_memory import describe

GB = 10**9
WHOLE = (
    "at most 16.0 GB per process (weights 2.0 GB, gradients 1.0 GB, optimizer 3.0 GB, a batch of "
    "8,192 tokens 10.0 GB; bfloat16 on cuda)"
)


def memory(batch: int) -> TrainingMemory:
    """Return one with 6 GB beside the batch."""
    return TrainingMemory(weights=2 * GB, gradients=GB, optimizer=3 * GB, batch=batch * GB)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (24, WHOLE),
        (12, "more than the 12.0 GB there are: set training.gradient_checkpointing=true (10.0 GB)"),
        (8, "set a smaller training.batch_tokens (with training.gradient_checkpointing=true this "),
        (5, "more than the 5.0 GB there are: take a smaller draft"),
    ],
)
def test_what_does_not_fit_has_a_remedy_that_helps(there: int, says: str) -> None:
    text = describe(
        memory(10), memory(4), there * GB, training=TrainingConfig(), where="bfloat16 on cuda"
    )
    assert says in text
    assert text.endswith(says) == (there == 24)


def test_checkpointing_is_not_proposed_to_those_who_have_it() -> None:
    training = TrainingConfig(gradient_checkpointing=True)
    text = describe(memory(4), memory(4), 9 * GB, training=training, where="")
    assert "set a smaller training.batch_tokens" in text
    assert "set training.gradient_checkpointing" not in text
