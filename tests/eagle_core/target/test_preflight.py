"""What cannot work is refused in seconds, by name, before anything is computed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4Config,
    Llama4TextConfig,
    LlavaConfig,
    Mamba2Config,
    Mistral3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from eagle_core.errors import ConfigError, CorruptError
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.model import TargetModel
from eagle_core.target.preflight import check_target, check_weights
from eagle_core.target.weights import SECOND_COPIES, WANTED_FILES, weight_digests
from flows.bridge.draft_setup import require_draft_sizes
from tests import tiny
from tests.tiny import SIZES

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
NEXT = Qwen3NextConfig(**SIZES, **EXPERTS, **LINEAR, shared_expert_intermediate_size=24)
BLOCK = 32

Change = Callable[[Path], None]


@pytest.fixture
def folder(tiny_target_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny target."""
    return shutil.copytree(tiny_target_path, tmp_path / "target")


def target(folder: Path, **changes: Any) -> TargetConfig:
    """Return the configuration of a target in `folder`."""
    given = {"name": "odd", "model": str(folder), "dtype": "float32", "device": "cpu"}
    return TargetConfig.model_validate(given | changes)


def write(folder: Path, config: PretrainedConfig) -> Path:
    """Write a random model of `config` beside the tiny tokenizer; return the folder."""
    tiny.write_target(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights after `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrite config.json with other values."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> list[Path]:
    """Store the weights in several files with an index; return the files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    return files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")


def replace_by_page(path: Path) -> None:
    path.write_text("<!doctype html><title>404 Not Found</title>")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, r"is missing; `hf download ORG/MODEL --local-dir "),
        (empty, r"is empty; delete it, then `hf download"),
        (truncate, r"is cut: it has [\d,]+ bytes, and its header says [\d,]+; delete it"),
        (cut_in_header, r"is cut or no safetensors file"),
        (point, r"is a Git LFS pointer of 65 bytes, not the weights; run `git lfs pull`"),
        (replace_by_page, r"is cut or no safetensors file"),
    ],
)
def test_a_weight_file_that_is_not_whole_is_named(folder: Path, damage: Change, said: str) -> None:
    path = shard(folder)[1]
    check_weights(target(folder))
    damage(path)
    for check in (check_weights, check_target):
        with pytest.raises((ConfigError, CorruptError), match=rf"{path.name} {said}"):
            check(target(folder))


def test_an_index_without_files_and_a_wrong_one_are_named(folder: Path) -> None:
    paths = shard(folder)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    moved = dict.fromkeys(document["weight_map"], paths[0].name)
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CorruptError, match=rf"index\.json places .* in {paths[0].name}, which"):
        check_weights(target(folder))
    index.write_text("{cut")
    with pytest.raises(CorruptError, match=r"index\.json is no index of weights"):
        check_weights(target(folder))
    index.unlink()
    with pytest.raises(ConfigError, match=r"index\.json is missing; `hf download"):
        check_weights(target(folder))
    index.write_text(json.dumps(document))
    for path in paths:
        path.unlink()
    with pytest.raises(ConfigError, match=rf"{paths[0].name} is missing"):
        check_weights(target(folder))


def _read_alike(folder: Path) -> None:
    """Require that check, loading and training read the same weights."""
    check_target(target(folder))
    model = TargetModel.load(target(folder))
    embedding, head = load_ends(folder, dtype=torch.float32)
    assert torch.equal(head, model.lm_head_weight)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(embedding, whole.get_input_embeddings().weight)


@pytest.mark.parametrize("single_is_newer", [True, False])
def test_a_single_file_counts_before_an_index_everywhere(
    folder: Path, tmp_path: Path, *, single_is_newer: bool
) -> None:
    other = tiny.write_target(tmp_path / "other", seed=7)
    single = other / "model.safetensors"
    if not single_is_newer:
        kept = shutil.copy(folder / "model.safetensors", tmp_path / "kept")
        shutil.copy(single, folder / "model.safetensors")
        single = Path(kept)
    paths = shard(folder)
    assert set(weight_digests(folder)) == {"config.json", *(path.name for path in paths)}
    shutil.copy(single, folder / "model.safetensors")
    assert set(weight_digests(folder)) == {"config.json", "model.safetensors"}
    _read_alike(folder)
    paths[1].unlink()  # the index counts for nothing
    check_weights(target(folder))
    (folder / "model.safetensors.index.json").write_text("{cut")
    _read_alike(folder)


def test_the_files_that_are_digested_stay_the_same(folder: Path) -> None:
    save_file({"w": torch.zeros(2)}, folder / "consolidated.safetensors")
    names = {"config.json", "model.safetensors", "consolidated.safetensors"}
    assert set(weight_digests(folder)) == names


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model.safetensors"])
def test_a_single_file_of_another_name_is_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    said = rf"{name}, but transformers reads model\.safetensors: rename the file"
    for attempt in (check_target, check_weights):
        with pytest.raises(ConfigError, match=said):
            attempt(target(folder))
    with pytest.raises(ConfigError, match=said):
        load_ends(folder, dtype=torch.float32)


def test_several_files_of_other_names_need_an_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ConfigError, match=r"index\.json is missing"):
        check_target(target(folder))


@pytest.mark.parametrize("inner", ["sub", "a/b"])
def test_an_index_may_name_files_of_subfolders(folder: Path, inner: str) -> None:
    paths = shard(folder)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    (folder / inner).mkdir(parents=True)
    paths[1].rename(folder / inner / paths[0].name)  # its name twice, in two folders
    for tensor, file in document["weight_map"].items():
        if file == paths[1].name:
            document["weight_map"][tensor] = f"{inner}/{paths[0].name}"
    index.write_text(json.dumps(document))
    _read_alike(folder)
    digests = weight_digests(folder)
    assert digests[f"{inner}/{paths[0].name}"] != digests[paths[0].name]


def test_an_index_without_metadata_is_refused_before_loading(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document.pop("metadata")
    index.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r'index\.json has no "metadata".*; add "metadata": {}'):
        check_target(target(folder))
    index.write_text(json.dumps(document | {"metadata": {}}))
    _read_alike(folder)


def _drop_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.3." in name]:
        del tensors[name]


def _other_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers", "blocks")] = tensors.pop(name)


def _drop_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def _add_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)


def _add_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.8.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.5.mlp.up_proj.weight"] = torch.zeros(130, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop_a_layer, r"no weights for model\.layers\.3\.\S+, .* and 6 more"),
        (_other_prefix, r"no weights for model\.layers\.0\.\S+, .* and 69 more"),
        (_drop_head, r"no weights for lm_head\.weight"),
        (_add_bias, r"no place for: model\.layers\.2\.self_attn\.q_proj\.bias"),
        (_add_layer, r"no place for: model\.layers\.8\.mlp\.up_proj\.weight"),
        (_widen, r"another shape for model\.layers\.5\.mlp\.up_proj\.weight \[130, 64\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_and_at_loading(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(CorruptError, match=rf"target odd: .*LlamaForCausalLM: .*{said}"):
        check_target(target(folder))
    with pytest.raises(CorruptError, match=rf"target odd: .*LlamaForCausalLM: .*{said}"):
        TargetModel.load(target(folder))


def test_one_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, Qwen3MoeConfig(**SIZES, **EXPERTS))
    check_target(target(folder))

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.4.mlp.experts.2.up_proj.weight"]

    change_weights(folder, drop)
    with pytest.raises(CorruptError, match=r"target odd: "):
        check_target(target(folder))


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16),
        NEXT,
        GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_sound_target_is_let_through_and_loads(tmp_path: Path, config: PretrainedConfig) -> None:
    folder = write(tmp_path, config)
    attention = "eager" if config.model_type == "gpt_oss" else "sdpa"
    check_target(target(folder, attention=attention), max_length=128)
    assert TargetModel.load(target(folder, attention=attention)).aux_layers == (1, 3, 4)


def test_tensors_for_other_purposes_are_let_through(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in (
            "mtp.layers.0.mlp.up_proj.weight",
            "model.vision_tower.layers.0.mlp.weight",
            "model.layers.8.eh_proj.weight",
            "model.layers.0.self_attn.k_proj.k_scale",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
        ):
            tensors[name] = torch.zeros(4)

    change_weights(folder, add)
    change_config(folder, num_nextn_predict_layers=1)
    check_target(target(folder))
    TargetModel.load(target(folder))


def test_second_copies_of_the_weights_are_neither_read_nor_downloaded(folder: Path) -> None:
    copy = {"layers.0.attention.wq.weight": torch.zeros(4, 4)}
    save_file(copy, folder / "consolidated.safetensors")
    check_target(target(folder))
    wanted = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    copies = [
        "original/model.safetensors",
        "original/params.json",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "fp16/model.safetensors",
        "metal/model.bin",
    ]
    chosen = filter_repo_objects(
        [*wanted, *copies], allow_patterns=WANTED_FILES, ignore_patterns=SECOND_COPIES
    )
    assert list(chosen) == wanted


CUSTOM_CODE = """
from transformers import LlamaForCausalLM


class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


def test_a_model_that_brings_its_code_is_checked_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(modules, str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (folder / "modeling_own.py").write_text(CUSTOM_CODE)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    config = target(folder, trust_remote_code=True)
    check_target(config, rolls_back=True)
    change_weights(folder, _drop_a_layer)
    with pytest.raises(CorruptError, match=r"weights of OwnForCausalLM: no weights for"):
        TargetModel.load(config)


def test_a_tokenizer_that_cannot_be_loaded_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{cut")
    with pytest.raises(ConfigError, match=r"target odd: the tokenizer in .* cannot be loaded"):
        check_target(target(folder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlavaConfig(), r"LlavaConfig \(llava\), which .* not load as a causal language model"),
        (Mistral3Config(), r"Mistral3Config \(mistral3\), which"),
        (Qwen2_5_VLConfig(), r"Qwen2_5_VLConfig \(qwen2_5_vl\), which"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_is_no_language_model_is_named(
    folder: Path, config: PretrainedConfig, said: str
) -> None:
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=rf"target odd: config\.json describes {said}") as raised:
        check_target(target(folder))
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param(
            Gemma2Config(**SIZES, final_logit_softcapping=None),
            r"Gemma2.* set target\.attention to",
            marks=pytest.mark.skipif(
                Gemma2ForCausalLM._supports_sdpa, reason="this transformers has the kernel"
            ),
        ),
        (
            Mamba2Config(
                vocab_size=416, hidden_size=64, num_heads=8, head_dim=16, num_hidden_layers=8
            ),
            r"Mamba2.*attention sdpa; set target\.attention to eager",
        ),
        (
            Gemma2Config(**SIZES, final_logit_softcapping=30.0),
            r"not lm_head\(.*final_logit_softcapping is 30",
        ),
        (PhiConfig(**SIZES), r"PhiForCausalLM has a head with a bias"),
    ],
    ids=["gemma2", "mamba2", "softcapping", "phi"],
)
def test_an_architecture_that_does_not_work_is_named(
    tmp_path: Path, config: PretrainedConfig, said: str
) -> None:
    folder = write(tmp_path, config)
    with pytest.raises(ConfigError, match=rf"target odd: .*{said}"):
        check_target(target(folder))


def test_a_decoder_without_layers_is_named_before_and_at_loading(folder: Path) -> None:
    config = GPT2Config(vocab_size=416, n_embd=64, n_layer=8, n_head=4)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    said = r"target odd: GPT2LMHeadModel is not supported: expected .* `layers`, found GPT2Model"
    for attempt in (check_target, TargetModel.load):
        with pytest.raises(ConfigError, match=said):
            attempt(target(folder))


@pytest.mark.parametrize(
    ("config", "rolls_back"),
    [
        (NEXT, False),
        (Qwen3_5TextConfig(**SIZES, head_dim=16, **LINEAR), False),
        (FalconH1Config(**SIZES, **MAMBA), False),
        (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 4), True),
        (Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=16), True),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_cache_that_does_not_roll_back_is_known_before_loading(
    tmp_path: Path, config: PretrainedConfig, *, rolls_back: bool
) -> None:
    folder = write(tmp_path, config)
    check_target(target(folder))
    assert TargetModel.load(target(folder)).can_roll_back is rolls_back
    if rolls_back:
        check_target(target(folder), rolls_back=True)
        return
    with pytest.raises(ConfigError, match=r"target odd \(.*recurrent state.*eyas run estimate"):
        check_target(target(folder), rolls_back=True)


def _scale(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name] * factor

    return change


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("model.layers.2.mlp.up_proj.weight", float("nan")),
        ("model.norm.weight", float("nan")),
        ("lm_head.weight", float("inf")),
    ],
)
def test_weights_that_are_not_finite_are_called_so(folder: Path, name: str, factor: float) -> None:
    change_weights(folder, _scale(name, factor))
    with pytest.raises(CorruptError, match=r"target odd: its logits .* are not finite"):
        TargetModel.load(target(folder))


def _llama4(**changes: Any) -> dict[str, Any]:
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 96, "num_experts_per_tok": 1}
    return SIZES | experts | {"head_dim": 16} | changes


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}


@pytest.mark.parametrize(
    "config",
    [
        Llama4TextConfig(**_llama4()),
        Llama4Config(text_config=_llama4(model_type="llama4_text"), vision_config=VISION),
    ],
    ids=lambda config: config.model_type,
)
def test_a_decoder_one_level_below_is_found(tmp_path: Path, config: PretrainedConfig) -> None:
    folder = write(tmp_path, config)
    check_target(target(folder), max_length=128, rolls_back=True)
    require_draft_sizes(target(folder))
    assert TargetModel.load(target(folder)).aux_layers == (1, 3, 4)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in tensors if "layers.3.input_layernorm" in name)]

    change_weights(folder, drop)
    with pytest.raises(CorruptError, match=r"no weights for \S+layers\.3\.input_layernorm"):
        check_target(target(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, r"KeyError: 'foo'"),
        ({"hidden_act": "foo"}, r"KeyError: 'foo'"),
        ({"num_attention_heads": 0}, r"modulo by zero"),
        ({"num_key_value_heads": 0}, r"ZeroDivisionError: "),
        ({"head_dim": -4}, r"RuntimeError: .*negative dimension"),
        ({"pad_token_id": 100_000}, r"AssertionError: Padding_idx"),
        ({"quantization_config": "x"}, r"'str' object has no attribute"),
        ({"quantization_config": [1]}, r"'list' object has no attribute"),
    ],
)
def test_values_of_which_no_model_can_be_built_are_one_error(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=rf"target odd: .*config\.json.*{said}") as raised:
        check_target(target(folder))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_is_known_as_its_configuration_is_written(folder: Path, bits: str) -> None:
    written = BitsAndBytesConfig(**{bits: True}).to_dict()
    change_config(folder, quantization_config=json.loads(json.dumps(written, default=str)))
    try:
        check_target(target(folder))
    except ConfigError as error:  # where the package is not installed
        assert "ImportError: " in str(error)  # noqa: PT017 (either is right)


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp.", "a."])
def test_ends_of_modules_that_predict_further_are_left_alone(folder: Path, prefix: str) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{prefix}embed_tokens.weight"] = torch.zeros_like(tensors["lm_head.weight"])
        tensors[f"{prefix}lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"])

    before = load_ends(folder, dtype=torch.float32)
    change_weights(folder, add)
    for end, expected in zip(load_ends(folder, dtype=torch.float32), before, strict=True):
        assert torch.equal(end, expected)
    TargetModel.load(target(folder))
    check_target(target(folder))


def test_a_tied_model_may_be_stored_under_the_name_of_its_head(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.embed_tokens.weight"]

    change_weights(folder, drop)
    with pytest.raises(CorruptError, match=r"no weights for model\.embed_tokens\.weight"):
        check_target(target(folder))
    change_config(folder, tie_word_embeddings=True)
    _read_alike(folder)


@pytest.mark.parametrize("half", ["_scales", "_blocks"])
def test_half_of_a_4_bit_weight_is_refused(folder: Path, half: str) -> None:
    name = "model.layers.3.mlp.experts.down_proj"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("_scales", "_blocks"):
            if end != half:
                tensors[f"{name}{end}"] = torch.zeros(4, 64, 3, dtype=torch.uint8)

    change_weights(folder, add)
    with pytest.raises(CorruptError, match=rf"has no scales or blocks {name}{half}"):
        check_target(target(folder))


def test_a_setting_that_the_architecture_does_not_have_is_ignored(tmp_path: Path) -> None:
    folder = tiny.write_target(tmp_path / "llama")
    change_config(folder, logit_scale=0.5, final_logit_softcapping=30.0)
    _read_alike(folder)
    cohere = write(tmp_path / "cohere", CohereConfig(**SIZES, logit_scale=0.5))
    with pytest.raises(ConfigError, match=r"logit_scale is 0\.5"):
        check_target(target(cohere))


@pytest.mark.parametrize("held", ["[]", "[1]", '"x"', "{cut"])
def test_an_odd_generation_config_is_named(folder: Path, held: str) -> None:
    (folder / "generation_config.json").write_text(held)
    with pytest.raises(ConfigError, match=r"generation_config\.json .*download it again"):
        check_target(target(folder))


@pytest.mark.parametrize("kind", ["bos_token", "unk_token", "pad_token"])
def test_a_special_token_that_is_not_written_needs_no_embedding(folder: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({kind: "<beyond>"})
    tokenizer.save_pretrained(folder)
    check_target(target(folder))


def test_samples_longer_than_the_positions_are_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_target(target(folder), max_length=512)
    with pytest.raises(
        ConfigError, match=r"dataset\.max_length is 513, but target odd has 512 .*to 512 or less"
    ):
        check_target(target(folder), max_length=513)
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    change_config(folder, rope_parameters=scaled)
    check_target(target(folder), max_length=513)
    assert "is 513, but target odd has 512 positions (its RoPE is scaled)" in caplog.text


def _add_token(folder: Path, token: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)


def test_a_token_without_an_embedding_is_refused_where_it_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _add_token(folder, "<image>")
    num_rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    check_target(target(folder))
    assert f"<image> is token {num_rows}, but the embedding has {num_rows} rows" in caplog.text
    template = folder / "chat_template.jinja"
    template.write_text("<image>" + template.read_text())
    with pytest.raises(
        ConfigError, match=rf"<image> is token {num_rows}, but .* {num_rows} rows .*every conv"
    ):
        check_target(target(folder))


@pytest.mark.parametrize(
    ("quantisation", "said"),
    [
        ({"quant_method": "nope"}, r"does not know the quantization method nope"),
        ({"quant_method": "compressed-tensors"}, r"ImportError: compressed-tensors.*pip install"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, r"ImportError: .*AWQ"),
    ],
)
def test_a_quantisation_that_cannot_be_read_is_named(
    folder: Path, quantisation: dict[str, object], said: str
) -> None:
    change_config(folder, quantization_config=quantisation)
    with pytest.raises(ConfigError, match=rf"target odd: .*{said}"):
        check_target(target(folder))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
)
def test_vllm_is_not_asked_for_frequencies_that_depend_on_the_text(
    folder: Path, rope: dict[str, object]
) -> None:
    change_config(folder, rope_scaling=rope, original_max_position_embeddings=64)
    check_target(target(folder), captured="here")
    by_vllm = target(folder, backend="vllm")
    check_target(by_vllm, captured=None)
    with pytest.raises(ConfigError, match="vLLM chooses one set for all texts"):
        check_target(by_vllm, captured="on workers")


def write_fp8(folder: Path, *, quantized_head: bool) -> Path:
    """Write a Llama in blocks of 8-bit floats; return the folder."""
    tiny.write_target(folder)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.vocab_size = 416  # blocks divide it
    write(folder, config)

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in list(tensors.items()):
            if "proj" in name or (quantized_head and name == "lm_head.weight"):
                rows, columns = weight.shape
                blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
                scales = blocks.abs().amax((1, 3)) / 448
                eighth = (blocks / scales[:, None, :, None]).view(rows, columns)
                tensors[name] = eighth.to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scales

    change_weights(folder, quantize)
    quantisation = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    skipped = [] if quantized_head else ["lm_head"]
    change_config(folder, quantization_config=quantisation | {"modules_to_not_convert": skipped})
    return folder


@pytest.mark.parametrize("quantized_head", [False, True])
def test_the_head_of_an_8_bit_target_is_the_one_that_it_computes_with(
    tmp_path: Path, *, quantized_head: bool
) -> None:
    config = target(write_fp8(tmp_path, quantized_head=quantized_head))
    check_target(config)
    _, head = load_ends(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(head, TargetModel.load(config).lm_head_weight, rtol=1e-2, atol=1e-4)


def test_8_bit_weights_without_scale_are_refused(tmp_path: Path) -> None:
    folder = write_fp8(tmp_path, quantized_head=False)
    lacking = "model.layers.3.mlp.up_proj.weight_scale_inv"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[lacking]

    change_weights(folder, drop)
    with pytest.raises(CorruptError, match=rf"has no scales or blocks {lacking}"):
        check_target(target(folder))
    change_config(folder, quantization_config=None)
    with pytest.raises(CorruptError, match=r"no scales|no place for: .*weight_scale_inv"):
        check_target(target(folder))


@pytest.mark.parametrize(
    ("end", "dtype", "said"),
    [
        ("lm_head.weight_packed", torch.int32, r"the head is packed \(lm_head\.weight_packed"),
        ("lm_head.qweight", torch.int32, r"the head is packed \(lm_head\.qweight\)"),
        ("lm_head.weight", torch.uint8, r"lm_head\.weight is packed as U8"),
        ("lm_head.weight", torch.int8, r"lm_head\.weight is stored in 8 bits without a scale"),
    ],
)
def test_a_packed_head_is_never_taken_for_a_tied_one(
    folder: Path, end: str, dtype: torch.dtype, said: str
) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors[end] = torch.zeros(4, 4, dtype=dtype)

    change_weights(folder, pack)
    with pytest.raises(ConfigError, match=said):
        check_target(target(folder))
    if end != "lm_head.weight" or dtype == torch.int8:
        with pytest.raises(ConfigError, match=said):
            load_ends(folder, dtype=torch.float32)


@pytest.mark.parametrize(("scale", "factor"), [(2.0, 2.0), ([[1.0], [3.0]], 3.0)])
def test_a_head_with_a_scale_per_tensor_or_row_is_multiplied(
    folder: Path, scale: object, factor: float
) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.full((2, 64), 5, dtype=torch.int8)
        tensors["lm_head.weight_scale"] = torch.tensor(scale)

    change_weights(folder, quantize)
    _, head = load_ends(folder, dtype=torch.float32)
    assert head[1].tolist() == [5 * factor] * 64


def test_no_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values may be anything: only sizes are looked at, so that any size takes seconds."""
    opened: list[str] = []
    for path in shard(folder):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header])
        with path.open("r+b") as file:
            file.truncate(len(data))  # a hole, which takes no disk
        opened.append(path.name)
    monkeypatch.setattr("safetensors.safe_open", None)
    check_target(target(folder), max_length=64)
    assert len(opened) > 2
