"""What the settings of an evaluation mean together."""

import pytest

from eagle_core.evaluation.config import EvaluationConfig


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({}, 40 + 5),
        ({"engine": "llamacpp"}, 40 + 2 * (5 + 1)),
        ({"engine": "vllm", "draft_lengths": (3,)}, 40 + 2 * (5 + 1)),
        ({"engine": "vllm", "draft_lengths": (3, 9)}, 40 + 2 * (9 + 1)),
    ],
)
def test_a_text_takes_its_tokens_and_what_is_drafted_behind_them(
    settings: dict[str, object], positions: int
) -> None:
    """Engines write up to K tokens more than are kept, and draft K more."""
    own = {"max_new_tokens": 40, "draft_tokens": 5, **settings}
    assert EvaluationConfig.model_validate(own).positions_after_prompt == positions
