"""States of a sample never depend on the samples beside or before it, whatever its RoPE."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import batches_by_length, capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.recompute_model import RecomputeModel, StoredStates
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.model import TargetModel

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "longrope": Phi3Config(
        **SIZES,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters=LONG,
    ),
    "longrope of llama": LlamaConfig(
        **SIZES,
        max_position_embeddings=128,
        rope_parameters=LONG | {"original_max_position_embeddings": 32, "factor": 4.0},
    ),
    "dynamic": LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=DYNAMIC),
    "dynamic of qwen3": Qwen3Config(
        **SIZES, head_dim=8, max_position_embeddings=32, rope_parameters=DYNAMIC
    ),
    "dynamic of some layers": Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=16,
        max_position_embeddings=32,
        rope_parameters={"full_attention": DYNAMIC, "sliding_attention": PLAIN},
    ),
}
LENGTHS = (20, 30, 31, 32, 33, 40, 40, 60)
ALONE = (0, 4, 6)
"""Numbers of the samples that are compared with a new model's."""
NUM_GROUPS = {"longrope": 2, "dynamic": 4}


@pytest.fixture(params=CONFIGS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, TargetConfig]:
    """Name of the RoPE, and a random target with it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).bfloat16().save_pretrained(tmp_path)
    config = TargetConfig(name="long", model=str(tmp_path), dtype="float32", device="cpu")
    return request.param.split()[0], config


def samples() -> list[TokenizedSample]:
    """Return one random sample per length."""
    rng = np.random.default_rng(0)
    return [
        TokenizedSample(
            sample_id=f"{number}",
            input_ids=rng.integers(2, 90, length).astype(np.int32),
            loss_mask=np.ones(length, np.bool_),
        )
        for number, length in enumerate(LENGTHS)
    ]


def test_a_sample_has_the_states_that_it_has_alone(written: tuple[str, TargetConfig]) -> None:
    _, config = written
    target = TargetModel.load(config)
    together = {state.sample_id: state for state in capture_states(target, samples())}
    for sample in (samples()[number] for number in ALONE):
        (alone,) = capture_states(TargetModel.load(config), [sample])
        _require_close(together[sample.sample_id], alone)
        (after_others,) = capture_states(target, [sample])
        _require_close(after_others, alone)


def _require_close(found: HiddenStateSample, expected: HiddenStateSample) -> None:
    np.testing.assert_allclose(found.target_logsumexp, expected.target_logsumexp, atol=1e-3)
    np.testing.assert_array_equal(found.target_argmax, expected.target_argmax)


def test_recomputed_states_are_those_of_the_capture(written: tuple[str, TargetConfig]) -> None:
    _, config = written
    partial = RecomputeModel.load(config)
    captured = list(capture_states(TargetModel.load(config), samples()[::-1], for_recompute=True))
    for state in captured:
        derived = partial.recompute(
            StoredStates(input_ids=state.input_ids, late=state.aux_hidden_states[:, 2])
        )
        np.testing.assert_array_equal(derived.last, state.last_hidden_state)


def test_lengths_with_other_frequencies_are_not_in_one_batch(
    written: tuple[str, TargetConfig],
) -> None:
    name, config = written
    rope = TargetModel.load(config).rope
    batches = list(batches_by_length(samples(), batch_tokens=10_000, rope=rope))
    assert len(batches) == NUM_GROUPS[name]
    assert [len(one) for one in batches[-1]] == [32, 31, 30, 20]


@pytest.mark.parametrize(
    "rope",
    [
        PLAIN,
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0},
    ],
)
def test_other_rope_leaves_the_batches_as_they_were(rope: dict[str, Any]) -> None:
    found = LengthRope.of(LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=rope))
    assert found == LengthRope()
    assert len(list(batches_by_length(samples(), batch_tokens=10_000, rope=found))) == 1
