"""The limits of sampling under the names of each engine."""

from pathlib import Path

import pytest

from eagle_core.decoding.sampling_limits import NO_LIMITS, SamplingLimits
from eagle_core.serving.engine import Engine
from eagle_core.serving.llamacpp.server import LlamaCppEngine
from eagle_core.serving.served import Served
from eagle_core.serving.vllm import VllmEngine
from eagle_core.target.config import TargetConfig

# Neither is installed where these tests run, and the names need no engine.
VLLM, LLAMACPP = VllmEngine.__new__(VllmEngine), LlamaCppEngine.__new__(LlamaCppEngine)
SERVED = Served(
    target=TargetConfig(name="tiny", model="tiny"), weights=Path("tiny"), max_length=512
)
LIMITS = SamplingLimits(top_p=0.9, top_k=40, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("engine", "penalty"), [(VLLM, "repetition_penalty"), (LLAMACPP, "repeat_penalty")]
)
def test_limits_have_the_engines_names_and_others_are_neutral(engine: Engine, penalty: str) -> None:
    found = engine.samplers(SERVED, LIMITS)
    assert (found["top_p"], found["top_k"], found[penalty]) == (0.9, 40, 1.1)
    neutral = engine.samplers(SERVED, NO_LIMITS)
    assert (neutral["top_p"], neutral["top_k"], neutral[penalty]) == (1.0, 0, 1.0)
    assert {found[name] for name in ("min_p", "presence_penalty", "frequency_penalty")} == {0.0}


def test_llamacpp_limits_in_the_order_of_the_others() -> None:
    found = LLAMACPP.samplers(SERVED, LIMITS)
    assert found["samplers"] == ("penalties", "temperature", "top_k", "top_p")
    assert found["repeat_last_n"] == SERVED.max_length  # all of a text and its prompt
