"""A target of which only config.json is here: what it would cost."""

from pathlib import Path
from unittest import mock

import pytest
from transformers import OPTConfig, Qwen3NextConfig

from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import read_headers
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.layer_slices import plain_layers
from eagle_core.target.memory.free_memory import MemoryShare
from eagle_core.target.memory.target_bytes import TargetBytes
from eagle_core.target.model_config import read_model_config
from eagle_core.target.sketch import READ_RATE, _kinds, sketch
from tests.eagle_core.target.layerwise.test_streamed import ARCHITECTURES, EAGER, write_model
from tests.eagle_core.target.test_preflight import change_config
from tests.tiny import SIZES

TASK_TOKENS = 16384


def described(folder: Path, config: TargetConfig) -> TargetConfig:
    """Return the target in `folder` without its weights."""
    for path in weights.weight_files(folder):
        path.unlink()
    return config


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-oss", "gemma3", "deepseek-v3"])
def test_its_sizes_are_those_of_its_weights(tmp_path: Path, name: str) -> None:
    config = write_model(ARCHITECTURES[name], tmp_path)
    if name in EAGER:
        config = config.model_copy(update={"attention": "eager"})
    model_config = read_model_config(config, tmp_path)
    expected = TargetBytes.of(config, model_config, read_headers(tmp_path, remedy=""))
    found = sketch(described(tmp_path, config), TASK_TOKENS)
    assert found.sizes == expected
    assert found.chosen is not None
    assert found.chosen.placement == "whole"
    assert found.pass_tokens == 0
    assert found.seconds_per_token


def test_each_kind_of_layer_is_timed_once(tmp_path: Path) -> None:
    whole = ARCHITECTURES["qwen3-next"]
    assert isinstance(whole, Qwen3NextConfig)
    config = write_model(whole, tmp_path)
    kinds = list(_kinds(plain_layers(config, read_model_config(config, tmp_path))))
    assert kinds == [(0, 6), (3, 2)]  # three of four layers are linear


def test_weights_that_are_streamed_are_read_in_each_pass(tmp_path: Path) -> None:
    config = write_model(ARCHITECTURES["llama"], tmp_path)
    streamed = described(tmp_path, config.model_copy(update={"placement": "streamed"}))
    found = sketch(streamed, TASK_TOKENS)
    assert found.chosen is not None
    assert found.chosen.placement == "streamed"
    assert found.chosen.pass_bytes == found.sizes.layers_on_disk
    assert found.pass_tokens == TASK_TOKENS
    seldom_read = found.sizes.layers_on_disk / READ_RATE / TASK_TOKENS
    assert found.seconds_per_token is not None
    assert found.seconds_per_token >= seldom_read
    with mock.patch("eagle_core.target.sketch.READ_RATE", found.sizes.layers_on_disk / 60.0):
        assert sketch(streamed, TASK_TOKENS).seconds_per_token == 60.0 / TASK_TOKENS


def test_too_little_memory_is_said_and_sizes_are_known(tmp_path: Path) -> None:
    config = write_model(ARCHITECTURES["llama"], tmp_path)
    found = sketch(described(tmp_path, config), TASK_TOKENS, MemoryShare(main=1))
    assert found.chosen is None
    assert "does not fit on its device, not even layer by layer" in found.why_none
    assert found.seconds_per_token is None, "no layer is built where there is no room for one"
    assert found.sizes.whole > 0


def test_quantized_weights_are_not_streamed_and_counted_whole(tmp_path: Path) -> None:
    config = write_model(ARCHITECTURES["llama"], tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "fp8"})
    found = sketch(described(tmp_path, config), TASK_TOKENS, MemoryShare(main=1))
    assert found.is_quantized
    assert found.chosen is not None
    assert found.chosen.placement == "whole"
    assert "quantized" in found.chosen.reason


def test_vllm_needs_no_kernel_of_transformers(tmp_path: Path) -> None:
    config = write_model(ARCHITECTURES["gpt-oss"], tmp_path)
    by_vllm = config.model_copy(update={"backend": "vllm", "attention": "flash_attention_2"})
    found = sketch(described(tmp_path, by_vllm), TASK_TOKENS)
    assert found.chosen is not None
    assert found.chosen.placement == "vllm"
    assert found.seconds_per_token is not None


def test_a_batch_has_no_more_tokens_than_there_are_positions(tmp_path: Path) -> None:
    config = write_model(OPTConfig(**SIZES, ffn_dim=96), tmp_path)
    assert sketch(described(tmp_path, config), TASK_TOKENS).seconds_per_token is not None


def test_what_is_read_is_as_large_as_the_stored_weights(tmp_path: Path) -> None:
    config = write_model(ARCHITECTURES["llama"], tmp_path)
    halves = sketch(described(tmp_path, config), TASK_TOKENS).sizes
    change_config(tmp_path, dtype="float32")
    assert sketch(config, TASK_TOKENS).sizes.layers_on_disk == 2 * halves.layers_on_disk


def test_weights_are_looked_for_and_never_fetched(tmp_path: Path) -> None:
    config = write_model(ARCHITECTURES["llama"], tmp_path)
    assert weights.are_here(config)
    assert not weights.are_here(described(tmp_path, config))
    assert weights.locate_description(config) == tmp_path
    with pytest.raises(ConfigError, match=r"has a config\.json but no \*\.safetensors"):
        weights.locate(config)
    missing = config.model_copy(update={"model": str(tmp_path / "nowhere")})
    assert not weights.are_here(missing)
    with pytest.raises(ConfigError, match="no model folder at"):
        weights.locate_description(missing)
