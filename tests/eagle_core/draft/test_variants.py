"""Every variant of a draft comes back from its export, or is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig, TensorLayout
from eagle_core.draft.importing import read_draft, read_draft_config, require_fit, warm_start
from eagle_core.draft.layout import EMBEDDING, HEAD
from eagle_core.draft.model import DraftModel
from eagle_core.draft.readers import Reader, lacking, readers_of, require_reader, require_serving
from eagle_core.errors import ConfigError, MismatchError
from tests.eagle_core.draft.variants import FULL, LLAMA3, VARIANTS, YARN, make_variant

AUX_LAYERS = (1, 3, 4)
LAYOUTS: tuple[TensorLayout, ...] = ("serving", "speculators")
NOT_IN_SPECULATORS = {"wider", "narrower", "qk_norm-biases", "both-norms", "many-llama"}


@pytest.fixture(scope="module")
def served(tiny_target_path: Path) -> ServedTarget:
    return ServedTarget.of(
        AutoConfig.from_pretrained(tiny_target_path), name_or_path="tiny", aux_layers=AUX_LAYERS
    )


def write(
    draft: DraftModel, served: ServedTarget, folder: Path, layout: TensorLayout = "serving"
) -> Path:
    return export(draft, served, folder, ExportConfig(dtype="float32", layouts=(layout,)))[layout]


def document_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document


def given_tensors(draft: DraftModel, layout: TensorLayout) -> dict[str, torch.Tensor]:
    """Return what an import of the export has: not what is the target's own."""
    tensors = draft.published_tensors()
    if layout == "serving" and not draft.config.has_own_embedding:
        del tensors[EMBEDDING]
    if draft.config.target_head:
        del tensors[HEAD]
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_an_export_read_again_is_the_same_draft(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path, name: str, layout: TensorLayout
) -> None:
    draft = make_variant(tiny_target_path, VARIANTS[name])
    if layout == "speculators" and name in NOT_IN_SPECULATORS:
        with pytest.raises(ConfigError, match=r"^speculators 0\.9\.0 has no "):
            write(draft, served, tmp_path, layout)
        assert not list(tmp_path.iterdir())
        return
    folder = write(draft, served, tmp_path, layout)
    imported = read_draft(folder)
    assert imported.config == read_draft_config(folder) == draft.config
    assert imported.aux_layers == AUX_LAYERS
    expected = given_tensors(draft, layout)
    assert imported.tensors.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert torch.equal(imported.tensors[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_draft_of_every_variant_starts_another(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path, name: str
) -> None:
    draft = make_variant(tiny_target_path, VARIANTS[name])
    other = make_variant(tiny_target_path, VARIANTS[name], seed=0)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    imported = read_draft(write(draft, served, tmp_path))
    assert warm_start(other, imported) == draft.config.draft_vocab_size
    for tensor_name, tensor in draft.published_tensors().items():
        assert torch.equal(other.published_tensors()[tensor_name], tensor), tensor_name


EXPECTED_KEYS: Mapping[str, Mapping[str, Any]] = {
    "layers": {"num_hidden_layers": 3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qk_norm": {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"},
    "norm_before_fc": {
        "norm_before_fc": True,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
            "use_aux_hidden_state": True,
            "norm_before_fc": True,
        },
    },
    "norm_before_residual": {"norm_before_residual": True},
    "fc_norm": {"fc_norm": True, "norm_output": True},
    "target_head": {"draft_vocab_size": None, "tie_word_embeddings": False},
    "wider": {"hidden_size": 160, "target_hidden_size": 64},
    "window": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention"],
        "use_sliding_window": True,
    },
    "linear": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("name", EXPECTED_KEYS)
def test_engines_find_each_variant_under_their_keys(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path, name: str
) -> None:
    folder = write(make_variant(tiny_target_path, VARIANTS[name]), served, tmp_path)
    document = document_of(folder)
    assert {key: document[key] for key in EXPECTED_KEYS[name]} == EXPECTED_KEYS[name]
    config = AutoConfig.for_model(**document)  # transformers, as engines load it
    if name == "linear":
        assert config.rope_parameters == EXPECTED_KEYS[name]["rope_parameters"]
    if name == "window":
        assert (config.sliding_window, list(config.layer_types)) == (8, ["sliding_attention"])


def test_further_layers_have_their_norm_where_each_engine_looks(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path
) -> None:
    draft = make_variant(tiny_target_path, VARIANTS["layers"])
    tensors = load_file(write(draft, served, tmp_path) / "model.safetensors")
    assert not any(name.startswith("midlayer.") for name in tensors)
    for number in (1, 2):
        norm = tensors[f"layers.{number}.input_layernorm.weight"]  # vLLM
        assert torch.equal(tensors[f"layers.{number}.hidden_norm.weight"], norm)  # the others
    first = tensors["layers.0.hidden_norm.weight"]
    assert torch.equal(first, draft.midlayer.hidden_norm.weight)
    library = load_file(write(draft, served, tmp_path, "speculators") / "model.safetensors")
    assert "layers.1.hidden_norm.weight" not in library


def test_only_a_draft_of_another_width_or_head_writes_its_own(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path
) -> None:
    names = {
        name: load_file(
            write(make_variant(tiny_target_path, VARIANTS[name]), served, tmp_path / name)
            / "model.safetensors"
        ).keys()
        for name in ("plain", "wider", "target_head")
    }
    assert {name for name, found in names.items() if EMBEDDING in found} == {"wider"}
    assert {name for name, found in names.items() if HEAD in found} == {"plain", "wider"}


LACKED: Mapping[Reader, set[str]] = {
    "vllm": set(),
    "sglang": {
        *("biases", "qk_norm", "qk_norm-biases", "norm_before_residual", "window", "dynamic"),
        *("own-yarn", "many-llama", "many-qwen3"),
    },
    "tensorrt_llm": {
        *("qk_norm", "qk_norm-biases", "norm_before_residual", "both-norms", "window", "dynamic"),
        *("own-yarn", "many-llama", "many-qwen3"),
    },
    "llamacpp": {
        *("layers", "biases", "qk_norm", "qk_norm-biases", "fc_norm", "both-norms", "window"),
        *("own-yarn", "many-llama", "many-qwen3"),
    },
    "speculators": NOT_IN_SPECULATORS,
}


@pytest.mark.parametrize("reader", LACKED)
def test_what_a_reader_lacks_is_refused_by_name(tiny_target_path: Path, reader: Reader) -> None:
    configs = {name: make_variant(tiny_target_path, VARIANTS[name]).config for name in VARIANTS}
    refused = {name for name, config in configs.items() if lacking(reader, config)}
    assert refused == LACKED[reader]
    for name, config in configs.items():
        if name in refused:
            cure = r"set export\.layouts" if reader == "speculators" else "choose vLLM"
            with pytest.raises(ConfigError, match=f"this draft was trained with: {cure}"):
                require_reader(reader, config)
        else:
            require_reader(reader, config)
            assert reader in readers_of(config)


def test_a_width_that_hides_what_is_not_yet_fused_is_refused(tiny_target_path: Path) -> None:
    config = make_variant(tiny_target_path, {"hidden_size": 192}).config
    with pytest.raises(
        ConfigError, match=r"no hidden_size three times.*choose vLLM 0\.32 or llama"
    ):
        require_reader("sglang", config)
    require_serving(config)


def test_a_given_draft_names_the_settings_that_it_needs(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path
) -> None:
    plain = make_variant(tiny_target_path, {}).config
    imported = read_draft(
        write(make_variant(tiny_target_path, VARIANTS["many-llama"]), served, tmp_path)
    )
    with pytest.raises(MismatchError) as caught:
        require_fit(plain, imported)
    for setting in (
        *("draft.hidden_size=160", "draft.num_hidden_layers=2", "draft.attention_bias=true"),
        *("draft.mlp_bias=true", "draft.norm_output=true", "draft.sliding_window=12"),
        "draft.rope_scaling=target (if the target is scaled like that)",
    ):
        assert setting in str(caught.value)
    require_fit(imported.config, imported)
    with pytest.raises(MismatchError, match=r"set draft\.rope_scaling=none$"):
        require_fit(
            plain.model_copy(update={"rope_scaling": LLAMA3}),
            read_draft(write(make_variant(tiny_target_path, {}), served, tmp_path / "plain")),
        )
    scaled = imported.config.model_copy(update={"rope_scaling": YARN})
    with pytest.raises(MismatchError, match=r"rope_scaling .*; start from another draft$"):
        require_fit(scaled, imported)
    other = plain.model_copy(update={"rope_theta": 5.0, "sliding_window": 4})
    with pytest.raises(MismatchError, match=r"rope_theta 10000\.0 \(ours 5\.0\).*from another"):
        require_fit(other, read_draft(write(make_variant(tiny_target_path, {}), served, tmp_path)))


def test_heads_that_transformers_refuses_are_refused_here(tiny_target_path: Path) -> None:
    uneven = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    config = make_variant(tiny_target_path, uneven).config
    with pytest.raises(
        ConfigError, match=r"no engine can serve .*: vLLM 0\.32 has no num_attention"
    ):
        require_serving(config)
    require_serving(make_variant(tiny_target_path, {**uneven, "qk_norm": True}).config)


def test_a_draft_with_its_own_head_says_so_to_one_with_the_targets(
    tiny_target_path: Path, served: ServedTarget, tmp_path: Path
) -> None:
    with_head = make_variant(tiny_target_path, {"draft_vocab_size": None})
    imported = read_draft(write(with_head, served, tmp_path))
    assert not imported.config.target_head
    ours = make_variant(tiny_target_path, FULL).config
    with pytest.raises(MismatchError, match=r"set draft\.target_head=false$"):
        require_fit(ours, imported)
