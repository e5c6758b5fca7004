"""Exports say what engines read, come back bit for bit, and load in real speculators."""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig

from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig, ExportLayout
from eagle_core.draft.importing import read_draft, warm_start
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.draft.layout import expected_shapes
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from tests.eagle_core.draft.variants import VARIANTS, make_variant
from tests.side_environment import side_environment

LAYOUTS: tuple[ExportLayout, ...] = ("serving", "speculators")
AUX_LAYERS = (1, 3, 4)
FLOAT32 = ExportConfig(dtype="float32")
COMPUTED_BY_SPECULATORS = (
    *("plain", "layers", "biases", "qk_norm", "norm_before_fc", "norm_before_residual"),
    *("fc_norm", "target_head", "yarn", "many-qwen3"),
)
PROBE = Path(__file__).with_name("speculators_probe.py")
ENGINE_KEYS = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "draft_vocab_size": 200,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "eagle_config": {
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
        "use_aux_hidden_state": True,
    },
}


def make_draft(
    target_path: Path, *, draft_vocab_size: int = 200, seed: int = 0, norms: bool = False
) -> DraftModel:
    """Return a draft of the tiny target in which no weight is trivial."""
    changes = {"fc_norm": norms, "norm_output": norms}
    return make_variant(target_path, changes, draft_vocab_size=draft_vocab_size, seed=seed)


@pytest.fixture(scope="module")
def draft(tiny_target_path: Path) -> DraftModel:
    return make_draft(tiny_target_path)


@pytest.fixture(scope="module")
def served(tiny_target_path: Path) -> ServedTarget:
    return ServedTarget.of(
        AutoConfig.from_pretrained(tiny_target_path),
        name_or_path=str(tiny_target_path),
        aux_layers=AUX_LAYERS,
    )


def trained_tensors(draft: DraftModel) -> dict[str, Tensor]:
    """Return everything but the embedding, which is the target's."""
    tensors = draft.published_tensors()
    return {name: tensor for name, tensor in tensors.items() if name != "embed_tokens.weight"}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_serving_export_is_what_engines_expect(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    document = json.loads((folder / "config.json").read_text())
    assert {key: document[key] for key in ENGINE_KEYS} == ENGINE_KEYS
    assert document["vocab_size"] == draft.config.vocab_size
    assert "target_hidden_size" not in document
    tensors = load_file(folder / "model.safetensors")
    require_equal(tensors, trained_tensors(draft))
    shapes = expected_shapes(draft.config)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, shape in shapes.items() if name != "embed_tokens.weight"
    }
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert int(tensors["t2d"].sum()) == 200
    assert tensors["t2d"][torch.arange(200) + tensors["d2t"]].all()


@pytest.mark.parametrize("norms", [False, True], ids=["eagle3", "eagle3.1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_read_again_is_the_same_draft(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path, layout: ExportLayout, norms: bool
) -> None:
    draft = make_draft(tiny_target_path, norms=norms)
    imported = read_draft(export(draft, served, tmp_path, FLOAT32)[layout])
    assert imported.config == draft.config
    assert imported.aux_layers == AUX_LAYERS
    expected = draft.published_tensors() if layout == "speculators" else trained_tensors(draft)
    require_equal(dict(imported.tensors), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_over_the_whole_vocabulary_comes_back(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path, layout: ExportLayout
) -> None:
    vocab_size = AutoConfig.from_pretrained(tiny_target_path).vocab_size
    whole = make_draft(tiny_target_path, draft_vocab_size=vocab_size)
    folder = export(whole, served, tmp_path, FLOAT32)[layout]
    found = load_file(folder / "model.safetensors")
    assert not {"d2t", "t2d"} & found.keys()  # vLLM refuses an export with a map it has no use for
    expected = whole.published_tensors() if layout == "speculators" else trained_tensors(whole)
    require_equal(dict(read_draft(folder).tensors), expected)


def test_bfloat16_export_rounds_weights_and_keeps_the_vocabulary(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    config = ExportConfig(layouts=("serving",), with_embedding=True)
    folder = export(draft, served, tmp_path, config)["serving"]
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in draft.published_tensors().items():
        rounded = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(tensors[name], rounded), name


def test_an_export_is_for_states_as_the_target_gives_them(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    aux = torch.randn(5, 3 * draft.config.target_hidden_size) * draft.aux_scale
    exported = load_file(folder / "model.safetensors")["fc.weight"]
    assert torch.equal(functional.linear(aux, exported), draft.fuse(aux))
    in_training = functional.linear(aux / draft.aux_scale, draft.fc.weight)
    torch.testing.assert_close(draft.fuse(aux), in_training)


def test_exporting_again_replaces_an_export_and_nothing_else(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    export(draft, served, tmp_path, FLOAT32)
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no export wrote"):
        export(draft, served, tmp_path, FLOAT32)
    assert (folder / "notes.txt").read_text() == "mine"


def test_drafts_of_other_kinds_are_refused(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    path = folder / "model.safetensors"
    good = load_file(path)
    document = json.loads((folder / "config.json").read_text())

    def read_with(tensors: dict[str, Tensor], **changes: object) -> None:
        save_file(tensors, path)
        (folder / "config.json").write_text(json.dumps({**document, **changes}))
        read_draft(folder)

    with pytest.raises(MismatchError, match=r"not part of the draft: fc\.bias; start from"):
        read_with(good | {"fc.bias": torch.ones(64)})
    with pytest.raises(ConfigError, match=r"lacks fc_norm\.1\.weight, fc_norm\.2\.weight"):
        read_with(good | {"fc_norm.0.weight": torch.ones(64)})
    with pytest.raises(MismatchError, match="rope_scaling of type llama3 lacks factor, low_freq"):
        read_with(good, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})
    with pytest.raises(ConfigError, match=r"lacks norm\.weight"):
        read_with({name: tensor for name, tensor in good.items() if name != "norm.weight"})
    with pytest.raises(ConfigError, match=r"mlp\.\w+\.weight is"):
        read_with(good, intermediate_size=256)
    with pytest.raises(CorruptError, match=r"layer_ids is \[1, None, 3\]; expected numbers"):
        read_with(good, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, None, 3]})
    with pytest.raises(CorruptError, match="contradict"):
        read_with(good | {"t2d": good["t2d"].roll(1)})


def test_what_the_weights_say_counts_where_a_configuration_says_nothing_or_the_targets(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    """As in public drafts: 40 layers with the weights of one, no number of key-value heads."""
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    path = folder / "config.json"
    document = json.loads(path.read_text()) | {"num_hidden_layers": 40}
    del document["num_key_value_heads"], document["head_dim"]
    path.write_text(json.dumps(document))
    assert read_draft(folder).config == draft.config


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b"{", r"config\.json is not JSON"),
        ("config.json", b"[1]", r"config\.json is not a JSON object"),
        (
            "config.json",
            b'{"transformer_layer_config": 3}',
            "transformer_layer_config is not an object",
        ),
        ("model.safetensors", b"\x40\x00", "cannot be read"),
        ("pytorch_model.bin", b"cut", "cannot be read"),
        ("pytorch_model.bin", b"", "cannot be read"),
    ],
)
def test_damaged_drafts_are_named(
    draft: DraftModel,
    served: ServedTarget,
    tmp_path: Path,
    name: str,
    content: bytes,
    expected: str,
) -> None:
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptError, match=expected):
        read_draft(folder)


def test_weights_that_are_not_finite_are_neither_exported_nor_started_from(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptError, match=r"not finite: norm\.weight; start from another"):
        read_draft(folder)
    ruined = copy.deepcopy(draft)
    with torch.no_grad():
        ruined.fc.weight[0, 0] = torch.inf
    with pytest.raises(CorruptError, match=r"new.serving: not finite: fc\.weight; export another"):
        export(ruined, served, tmp_path / "new", FLOAT32)
    assert not (tmp_path / "new").exists()


def test_pickled_weights_with_a_wrapper_prefix_are_read(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    folder = export(draft, served, tmp_path, FLOAT32)["serving"]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors["t2d"]  # EAGLE's own files need d2t alone
    torch.save({f"model.{name}": t for name, t in tensors.items()}, folder / "pytorch_model.bin")
    require_equal(dict(read_draft(folder).tensors), trained_tensors(draft))


def test_warm_start_takes_the_rows_that_both_vocabularies_have(
    draft: DraftModel, tiny_target_path: Path, served: ServedTarget, tmp_path: Path
) -> None:
    imported = read_draft(export(draft, served, tmp_path, FLOAT32)["serving"])
    other = make_draft(tiny_target_path, draft_vocab_size=150, seed=5)
    before = other.lm_head.weight.clone()
    common = other.t2d & draft.t2d
    assert warm_start(other, imported) == int(common.sum())
    for target_id in torch.nonzero(other.t2d).squeeze(1).tolist():
        row = other.lm_head.weight[int(other.t2d[:target_id].sum())]
        theirs = draft.lm_head.weight[int(draft.t2d[:target_id].sum())]
        expected = theirs if common[target_id] else before[int(other.t2d[:target_id].sum())]
        assert torch.equal(row, expected)
    assert torch.equal(other.fusing_weight(), draft.fusing_weight())
    assert not torch.equal(other.fc.weight, draft.fc.weight)  # each has its own channel scale
    assert torch.equal(other.midlayer.mlp.up_proj.weight, draft.midlayer.mlp.up_proj.weight)


def test_warm_start_refuses_another_width(
    draft: DraftModel, served: ServedTarget, tmp_path: Path
) -> None:
    imported = read_draft(export(draft, served, tmp_path, FLOAT32)["serving"])
    wider = DraftModel(draft.config.model_copy(update={"intermediate_size": 256}))
    with pytest.raises(
        MismatchError, match=r"_size 128 \(ours 256\); set draft\.intermediate_size=128$"
    ):
        warm_start(wider, imported)
    normed = DraftModel(draft.config.model_copy(update={"fc_norm": True}))
    with pytest.raises(MismatchError, match=r"False \(ours True\); set draft\.fc_norm=false$"):
        warm_start(normed, imported)


@pytest.fixture(scope="module")
def speculators_python() -> Path:
    """Interpreter of an environment with speculators beside this one's packages."""
    # Pinned packages without dependencies: they would replace torch and transformers.
    pinned = ["--no-deps", "speculators==0.9.0", "hs-connectors==0.9.0"]
    needed = ["loguru", "openai", "aiohttp", "httpx", "rich", "typer", "pydantic-settings"]
    return side_environment("speculators", pinned, needed)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTED_BY_SPECULATORS)
def test_the_real_speculators_package_computes_our_logits(
    tiny_target_path: Path,
    served: ServedTarget,
    speculators_python: Path,
    tmp_path: Path,
    name: str,
) -> None:
    draft = make_variant(tiny_target_path, VARIANTS[name])
    folder = export(draft, served, tmp_path, FLOAT32)["speculators"]
    generator = torch.Generator().manual_seed(3)
    num_tokens = 24
    aux = torch.randn(num_tokens, 3 * 64, generator=generator)
    next_ids = torch.randint(draft.config.vocab_size, (num_tokens,), generator=generator)
    save_file({"aux": aux, "next_ids": next_ids}, tmp_path / "inputs.safetensors")
    output = tmp_path / "output.safetensors"
    subprocess.run(
        [speculators_python, PROBE, folder, tmp_path / "inputs.safetensors", output],
        check=True,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
    )
    found = load_file(output)
    assert found["layers"].tolist() == [layer + 1 for layer in AUX_LAYERS]
    omitted = set() if draft.config.draft_vocab_size == 200 else {"d2t", "t2d"}
    for tensor_name, tensor in draft.published_tensors().items():
        if tensor_name not in omitted:
            theirs = found[f"tensor.{tensor_name.replace('midlayer.', 'layers.0.')}"]
            assert torch.equal(theirs, tensor), tensor_name
    # From step 2 on, its windows are longer by a token each: what it trains with is not decoding.
    num_steps = 1 if draft.config.sliding_window else 3
    for step, expected in enumerate(_logits(draft, aux, next_ids, num_steps=num_steps)):
        torch.testing.assert_close(
            found[f"logits.{step}"][: len(expected)], expected, rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def _logits(draft: DraftModel, aux: Tensor, next_ids: Tensor, *, num_steps: int) -> list[Tensor]:
    """Return each step's logits [T - step, D] by decoding with the cache, index by index."""
    per_step: list[list[Tensor]] = [[] for _ in range(num_steps)]
    fused = draft.fuse(aux).unsqueeze(0)
    for index in range(len(next_ids)):
        cache = DraftCache()
        ids = next_ids[: index + 1].unsqueeze(0)
        positions = torch.arange(index + 1).unsqueeze(0)
        hidden = draft.decode(ids, fused[:, : index + 1], positions, cache)[:, -1:]
        per_step[0].append(draft.logits(hidden)[0, 0])
        for step in range(1, min(num_steps, len(next_ids) - index)):
            token = next_ids[index + step].reshape(1, 1)
            hidden = draft.recurrent(hidden)
            hidden = draft.decode(token, hidden, torch.tensor([[index + step]]), cache)
            per_step[step].append(draft.logits(hidden)[0, 0])
    return [torch.stack(rows) for rows in per_step]


FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Linear layers that both engines put into one."""
PARAMETERS_OF_SGLANG = {
    *("model.fc.weight", "model.norm.weight", "lm_head.weight"),
    *(f"model.fc_norm.{number}.weight" for number in range(3)),
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.hidden_norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
}
"""SGLang 0.5.23, `srt/models/llama_eagle3.py`, but for the embedding, which is the target's."""
PARAMETERS_OF_TENSORRT_LLM = {
    name.replace("layers.0", "midlayer") for name in PARAMETERS_OF_SGLANG
} | {"model.d2t"}
"""TensorRT-LLM, `_torch/models/modeling_speculative.py` at 00679c66, `Eagle3DraftModel`."""


def exported_names(target_path: Path, served: ServedTarget, folder: Path) -> set[str]:
    """Return the names of a draft with all norms, in layout serving, without the fused layers."""
    draft = make_draft(target_path, norms=True)
    names = load_file(export(draft, served, folder, FLOAT32)["serving"] / "model.safetensors")
    parts = (name.split(".") for name in names)
    return {".".join(FUSED.get(part, part) for part in name) for name in parts}


def test_sglang_has_a_parameter_for_each_tensor_and_none_is_left_unset(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path
) -> None:
    names = exported_names(tiny_target_path, served, tmp_path)
    assert {"d2t", "t2d"} <= names  # read apart from the parameters
    loaded = {name.replace("midlayer", "layers.0") for name in names - {"d2t", "t2d"}}
    assert {
        name if name in PARAMETERS_OF_SGLANG else f"model.{name}" for name in loaded
    } == PARAMETERS_OF_SGLANG


def test_tensorrt_llm_has_a_parameter_for_each_tensor_and_none_is_left_unset(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path
) -> None:
    names = exported_names(tiny_target_path, served, tmp_path) - {"t2d"}  # it reads d2t only
    assert {
        name if name.startswith("lm_head") else f"model.{name}" for name in names
    } == PARAMETERS_OF_TENSORRT_LLM
    document = json.loads((tmp_path / "serving" / "config.json").read_text())
    # "draft_vocab_size" and this name select EAGLE3LlamaForCausalLM (modeling_auto.py)
    (architecture,) = document["architectures"]
    assert f"EAGLE3{architecture.replace('Eagle3', '')}" == "EAGLE3LlamaForCausalLM"
    assert document["fc_norm"] is document["norm_output"] is True
