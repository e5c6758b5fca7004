"""A target that cannot work is refused by every flow that runs it, before anything is tokenised."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4TextConfig,
    Olmo2Config,
    Qwen3NextConfig,
)

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.target.config import TargetConfig
from flows.bridge.draft_setup import require_draft_sizes
from flows.config.runner import RunnerConfig
from flows.hidden_states import hidden_states
from flows.offline import offline
from flows.online import online
from flows.plan import plan
from flows.regenerate import regenerate_flow
from flows.tasks.prepare import check_runnable, prepare_weights
from tests.tiny import SIZES

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def folder(tiny_target_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny target."""
    return shutil.copytree(tiny_target_path, tmp_path / "target")


@pytest.fixture
def own(target: TargetConfig, folder: Path) -> TargetConfig:
    """The target in `folder`."""
    return target.model_copy(update={"model": str(folder)})


@pytest.mark.parametrize("flow", [plan, hidden_states, online])
def test_more_tokens_than_positions_are_refused_before_tokenising(
    tmp_path: Path, own: TargetConfig, dataset: DatasetConfig, flow: Callable[..., object]
) -> None:
    long = dataset.model_copy(update={"max_length": 513})
    with pytest.raises(ConfigError, match=r"dataset\.max_length is 513.* 512 positions"):
        flow(target=own, dataset=long, home=str(tmp_path / "home"))
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.arrow"))


@pytest.mark.parametrize("flow", [offline, online])
def test_a_target_that_cannot_be_evaluated_is_refused_before_the_stages_that_take_hours(
    tmp_path: Path,
    target: TargetConfig,
    folder: Path,
    dataset: DatasetConfig,
    flow: Callable[..., object],
) -> None:
    config = Qwen3NextConfig(
        vocab_size=AutoConfig.from_pretrained(folder).vocab_size,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    hybrid = target.model_copy(update={"model": str(folder)})
    with pytest.raises(ConfigError, match=r"recurrent state.*eyas run estimate.*hidden-states"):
        flow(target=hybrid, dataset=dataset, home=str(tmp_path / "home"))
    assert not (tmp_path / "home" / "datasets").exists()


@pytest.mark.parametrize("flow", [plan, hidden_states, online, regenerate_flow])
def test_a_missing_layer_is_refused_before_the_data_set_is_read(
    tmp_path: Path,
    own: TargetConfig,
    folder: Path,
    dataset: DatasetConfig,
    flow: Callable[..., object],
) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptError, match=r"no weights for model\.layers\.3\."):
        flow(target=own, dataset=dataset, home=str(tmp_path / "home"))
    assert not list(tmp_path.rglob("manifest.json"))


def test_stages_that_only_read_weights_need_whole_files(own: TargetConfig, folder: Path) -> None:
    assert prepare_weights(own) == folder
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"model\.safetensors is cut"):
        prepare_weights(own)


def test_a_conversation_with_a_token_without_an_embedding_is_named(
    tmp_path: Path, own: TargetConfig, folder: Path, conversations_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    number = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    records = json.loads(conversations_path.read_text())
    records[7]["conversations"][0]["value"] = "What is in <image>?"
    source = tmp_path / "images.json"
    source.write_text(json.dumps(records))
    dataset = DatasetConfig(name="images", source=str(source), max_length=256)
    with pytest.raises(
        ConfigError,
        match=rf"images\.json, record 7 .*contains token {number} \(<image>\), .* {number} rows",
    ):
        plan(target=own, dataset=dataset, home=str(tmp_path))


def test_a_target_without_the_sizes_of_a_draft_is_refused(own: TargetConfig, folder: Path) -> None:
    gemma = Gemma4TextConfig(**SIZES, head_dim=16)
    AutoModelForCausalLM.from_config(gemma).to(torch.bfloat16).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no draft can be made for a gemma4_text .*head_dim"):
        check_runnable(own)
    Olmo2Config(**SIZES).save_pretrained(folder)
    require_draft_sizes(own)


def test_a_kernel_that_only_workers_have_is_not_needed_here(
    tmp_path: Path, own: TargetConfig, dataset: DatasetConfig
) -> None:
    flash = own.model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(ConfigError, match=r"flash_attention_2; set target\.attention to sdpa or"):
        hidden_states(target=flash, dataset=dataset, home=str(tmp_path))
    check_runnable(flash, max_length=256, runs_here=False)
    with pytest.raises(ConfigError, match=r"max_length is 513"):
        hidden_states(
            target=flash,
            dataset=dataset.model_copy(update={"max_length": 513}),
            runner=RunnerConfig(kind="ray"),
            home=str(tmp_path),
        )
