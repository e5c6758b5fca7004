"""Layer by layer, a target gives the bits that it gives as a whole."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample, TokenizedSample, sample_id
from eagle_core.target.capture import capture_groups, capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.layer_loader import PassTimes
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from eagle_core.target.layerwise.streamed import StreamedTarget
from eagle_core.target.model import TargetModel

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WITH_HEADS = {**SIZES, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, dynamic rope": LlamaConfig(
        **{**SIZES, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=4),
    "qwen3": Qwen3Config(**WITH_HEADS, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(
        **WITH_HEADS, **EXPERTS, decoder_sparse_step=2, mlp_only_layers=[5]
    ),
    "qwen3-next": Qwen3NextConfig(
        **WITH_HEADS,
        **EXPERTS,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "gpt-oss": GptOssConfig(
        **WITH_HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "gemma2": Gemma2Config(**WITH_HEADS, sliding_window=8, final_logit_softcapping=None),
    "gemma3": Gemma3TextConfig(**WITH_HEADS, sliding_window=8),
    "phi3": Phi3Config(**SIZES, sliding_window=8),
    "deepseek-v3": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
EAGER = {"gpt-oss", "gemma2"}


def write(name: str, folder: Path) -> TargetConfig:
    """Write the small model of an architecture."""
    config = write_model(ARCHITECTURES[name], folder)
    return config.model_copy(update={"attention": "eager"}) if name in EAGER else config


def write_model(model_config: PretrainedConfig, folder: Path) -> TargetConfig:
    """Write a small model with weights that matter everywhere."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
    with torch.no_grad():  # norms are ones otherwise, and leaving them out would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.bfloat16().save_pretrained(folder)
    return TargetConfig(
        name="small",
        model=str(folder),
        dtype="float32",
        device="cpu",
        batch_tokens=96,
    )


def samples(lengths: Sequence[int], seed: int = 0) -> list[TokenizedSample]:
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids = rng.integers(1, 90, length).astype(np.int32)
        mask = rng.random(length) < 0.5
        found.append(TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask))
    return found


def bits(states: Iterator[HiddenStateSample]) -> dict[str, tuple[bytes, ...]]:
    return {
        one.sample_id: (
            one.aux_hidden_states.tobytes(),
            one.last_hidden_state.tobytes(),
            one.target_argmax.tobytes(),
            one.target_logsumexp.tobytes(),
        )
        for one in states
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_by_layer_the_states_are_those_of_the_whole_model(
    name: str, dtype: str, tmp_path: Path
) -> None:
    config = write(name, tmp_path).model_copy(update={"dtype": dtype})
    given = samples((5, 41, 19, 60, 33, 7))
    whole = TargetModel.load(config)
    plain = StreamedTarget.load(config, group_tokens=10_000)
    in_main = StreamedTarget.load(config, group_tokens=100, states_wait_in_main=True)
    for for_recompute in (False, True):
        expected = bits(capture_states(whole, given, for_recompute=for_recompute))
        for streamed in (plain, in_main):
            found = bits(capture_states(streamed, given, for_recompute=for_recompute))
            assert found == expected, for_recompute


def test_a_layer_knows_its_number_in_the_model(tmp_path: Path) -> None:
    layers = StreamedTarget.load(write("llama", tmp_path), group_tokens=100)._layers
    built = layers._built(3, layers._read(3))
    numbers = [part.layer_idx for part in built.modules() if hasattr(part, "layer_idx")]
    assert numbers
    assert set(numbers) == {3}


def test_any_layers_can_be_captured(tmp_path: Path) -> None:
    config, given, chosen = write("llama", tmp_path), samples((5, 41, 19)), (0, 2, 7)
    whole, streamed = TargetModel.load(config), StreamedTarget.load(config, group_tokens=100)
    assert bits(capture_states(streamed, given, layers=chosen)) == bits(
        capture_states(whole, given, layers=chosen)
    )


def test_a_group_passes_each_layer_once_whatever_shards_it_has(tmp_path: Path) -> None:
    config = write("llama", tmp_path)
    shards = [samples((30, 40), 1), [], samples((50,), 2), samples((60, 20, 10), 3)]
    passed: list[int] = []
    streamed = StreamedTarget.load(config, group_tokens=1000, on_tokens=passed.append)
    found = [bits(states) for states in capture_groups(streamed, shards)]
    assert len(passed) == 8 * 4  # once a batch in each layer
    assert 210 <= sum(passed) < 250  # with padding
    assert streamed.times.num_passes == 1
    whole = TargetModel.load(config)
    assert found == [bits(capture_states(whole, shard)) for shard in shards]
    assert [len(one) for one in found] == [2, 0, 1, 3]


def test_groups_that_are_not_read_do_not_shift_the_next(tmp_path: Path) -> None:
    config = write("llama", tmp_path)
    shards = [samples((30, 40), 1), samples((50,), 2)]
    for target in (TargetModel.load(config), StreamedTarget.load(config, group_tokens=1)):
        found = [next(states).sample_id for states in capture_groups(target, shards)]
        assert found == [shards[0][1].sample_id, shards[1][0].sample_id]


def test_layers_that_are_not_a_chain_are_refused_with_what_to_set(tmp_path: Path) -> None:
    config = write("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        path.read_text().replace('"hidden_act"', '"num_kv_shared_layers": 2, "hidden_act"')
    )
    with pytest.raises(ConfigError, match=r"num_kv_shared_layers is 2.*target\.placement to whole"):
        StreamedTarget.load(config, group_tokens=100)


def test_layers_that_go_by_their_number_are_refused(tmp_path: Path) -> None:
    config = write_model(DiffLlamaConfig(**SIZES), tmp_path)
    config = config.model_copy(update={"attention": "eager"})
    with pytest.raises(ConfigError, match=r"another self_attn\.lambda_init; set target\.placement"):
        StreamedTarget.load(config, group_tokens=100)
    with pytest.raises(ConfigError, match=r"lambda_init; set store\.recompute to false"):
        RecomputeModel.load(config)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    config = write("llama", tmp_path)
    path = tmp_path / "config.json"
    document = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"quantized.*set target\.placement to whole or spread"):
        StreamedTarget.load(config, group_tokens=100)


def test_time_of_a_pass_is_that_of_reading_or_of_running() -> None:
    times = PassTimes(reading=20.0, placing=4.0, running=6.0, num_tokens=3000, num_passes=2)
    assert times.seconds(1000) == 12.0
    assert times.seconds(10_000) == 22.0


def test_logits_that_are_capped_are_refused(tmp_path: Path) -> None:
    capped = Gemma2Config(**WITH_HEADS, sliding_window=8, final_logit_softcapping=30.0)
    config = write_model(capped, tmp_path).model_copy(update={"attention": "eager"})
    with pytest.raises(ConfigError, match="soft-capping"):
        StreamedTarget.load(config, group_tokens=100)
