"""Given drafts with public drafts' careless configurations: taken where clear, else refused."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig, TensorLayout
from eagle_core.draft.importing import ImportedDraft, read_draft
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, MismatchError
from tests.eagle_core.draft.variants import FULL, LLAMA3, make_variant


class Given:
    """A made folder, to be changed before it is read."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.draft: DraftModel
        self.document: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.path = folder

    def make(
        self, changes: Mapping[str, Any] | None = None, layout: TensorLayout = "serving"
    ) -> "Given":
        """Write an export of a draft, and keep what it says."""
        self.draft = make_variant(self.target, changes or {})
        served = ServedTarget.of(
            AutoConfig.from_pretrained(self.target), name_or_path="tiny", aux_layers=(1, 3, 4)
        )
        settings = ExportConfig(dtype="float32", layouts=(layout,))
        self.path = export(self.draft, served, self.folder, settings)[layout]
        self.document = json.loads((self.path / "config.json").read_text())
        self.tensors = load_file(self.path / "model.safetensors")
        return self

    @property
    def layer(self) -> dict[str, Any]:
        layer: dict[str, Any] = self.document.get("transformer_layer_config", self.document)
        return layer

    def read(self) -> ImportedDraft:
        save_file(self.tensors, self.path / "model.safetensors")
        (self.path / "config.json").write_text(json.dumps(self.document))
        return read_draft(self.path)

    def rename(self, before: str, after: str) -> None:
        self.tensors = {
            name.replace(before, after, 1): tensor for name, tensor in self.tensors.items()
        }

    @property
    def config(self) -> DraftConfig:
        return self.draft.config


@pytest.fixture
def given(tiny_target_path: Path, tmp_path: Path) -> Given:
    return Given(tiny_target_path, tmp_path)


def test_sizes_that_are_missing_follow_from_the_weights(given: Given) -> None:
    given.make({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16})
    for key in ("num_key_value_heads", "head_dim", "intermediate_size", "target_hidden_size"):
        given.document.pop(key, None)
    assert given.read().config == given.config
    given.document |= {"head_dim": 16}
    for key in ("num_attention_heads", "vocab_size"):
        del given.document[key]
    assert given.read().config == given.config


def test_the_number_of_layers_is_that_of_the_weights(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    given.make({"num_hidden_layers": 2}).document["num_hidden_layers"] = 40
    with caplog.at_level(logging.INFO):
        assert given.read().config == given.config
    assert "says 40 layers; the weights have 2, and that is taken" in caplog.text
    given.document["num_hidden_layers"] = 1
    with pytest.raises(MismatchError, match="says num_hidden_layers 1, but the weights have 2 lay"):
        given.read()
    given.rename("layers.1.", "layers.2.")
    given.rename("layers.1.", "layers.2.")
    with pytest.raises(ConfigError, match="has the layers 0, 2; expected all up to the last"):
        given.read()


def test_five_layers_are_too_many(given: Given) -> None:
    given.make({"num_hidden_layers": 4}).document["num_hidden_layers"] = 5
    fourth = {name: one for name, one in given.tensors.items() if name.startswith("layers.3.")}
    given.tensors |= {
        name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in fourth.items()
    }
    with pytest.raises(MismatchError, match="has 5 layers; our draft has at most 4"):
        given.read()


@pytest.mark.parametrize("is_kept", [False, True], ids=["SGLang's", "both"])
def test_the_norm_of_a_further_layer_has_two_names(given: Given, is_kept: bool) -> None:
    given.make({"num_hidden_layers": 2})
    name = "layers.1.input_layernorm.weight"
    if not is_kept:
        del given.tensors[name]
        assert torch.equal(
            given.read().tensors[name], given.draft.published_tensors()[name].detach()
        )
        return
    given.tensors[name] = given.tensors[name] + 1
    with pytest.raises(MismatchError, match="SGLang would use the first and vLLM the second"):
        given.read()


def test_rope_theta_is_the_architectures_if_it_is_missing(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    given.make()
    for key in ("rope_theta", "rope_parameters"):
        del given.document[key]
    with caplog.at_level(logging.INFO):
        assert given.read().config == given.config
    assert "does not name rope_theta; taken as 10000, the default of llama" in caplog.text


def test_scalings_are_read_from_old_keys_too(given: Given) -> None:
    given.make({"rope_scaling": LLAMA3})
    del given.document["rope_parameters"]
    assert given.read().config == given.config
    scaling = given.document["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    assert given.read().config == given.config
    given.document["rope_scaling"] = {"type": "su", "factor": 2.0}
    with pytest.raises(MismatchError, match="rope_scaling of type su with factor is not supported"):
        given.read()
    given.document["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    assert given.read().config.rope_scaling is None


def test_a_vocabulary_may_have_one_of_its_maps_and_small_numbers(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    given.make()
    given.tensors["d2t"] = given.tensors["d2t"].int()
    expected = given.draft.d2t
    assert torch.equal(given.read().tensors["d2t"], expected)
    del given.tensors["d2t"]
    with caplog.at_level(logging.INFO):
        assert torch.equal(given.read().tensors["d2t"], expected)
    assert "no d2t; it follows from t2d" in caplog.text
    del given.tensors["t2d"]
    with pytest.raises(ConfigError, match="has 200 of 399 tokens but no d2t"):
        given.read()


def test_without_a_head_it_is_the_targets(given: Given) -> None:
    given.make(FULL)
    for said in ({"draft_vocab_size": None}, {"draft_vocab_size": given.config.vocab_size}):
        given.document |= said
        assert given.read().config == given.config
    given.document["draft_vocab_size"] = 200
    with pytest.raises(
        ConfigError, match=r"lacks lm_head\.weight, and has a vocabulary of its own"
    ):
        given.read()


def test_a_tied_head_is_the_embedding(given: Given) -> None:
    given.make({**FULL, "target_head": False}).document["tie_word_embeddings"] = True
    del given.tensors["lm_head.weight"]
    assert given.read().config.target_head
    embedding = given.draft.published_tensors()["embed_tokens.weight"].clone()
    given.tensors["embed_tokens.weight"] = embedding
    imported = given.read()
    assert not imported.config.target_head
    assert torch.equal(imported.tensors["lm_head.weight"], embedding)


def test_names_of_other_tools_are_read(given: Given) -> None:
    """A wrapper's prefix, a first layer by its number, and a buffer: as ModelOpt and EAGLE do."""
    given.make({"fc_norm": True, "norm_before_fc": True})
    given.rename("midlayer.", "layers.0.")
    given.rename("fc_norm.2.", "aux_norm_high.")
    given.tensors = {f"model.{name}": tensor for name, tensor in given.tensors.items()}
    given.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    given.document["eagle_config"] |= {
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "use_input_layernorm_in_first_layer": True,
        "parallel_draft_step": 1,
        "return_hidden_post_norm": True,
    }
    assert given.read().config == given.config.model_copy(update={"norm_output": True})
    given.document["eagle_config"]["use_mtp_layernorm"] = True
    with pytest.raises(MismatchError, match="has use_mtp_layernorm True, which our draft"):
        given.read()


def test_speculators_norms_its_residual_unless_it_says_otherwise(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    given.make({"norm_before_residual": True}, "speculators")
    assert given.read().config == given.config
    del given.document["norm_before_residual"]
    with caplog.at_level(logging.INFO):
        assert given.read().config == given.config
    assert "norm_before_residual; taken as true, as vLLM reads this layout" in caplog.text
    given.document["norm_before_residual"] = False
    assert not given.read().config.norm_before_residual


def test_biases_of_queries_keys_and_values_alone_are_completed(given: Given) -> None:
    given.make({"attention_bias": True})
    name = "midlayer.self_attn.o_proj.bias"
    del given.tensors[name]
    imported = given.read()
    assert imported.config == given.config
    assert not imported.tensors[name].any()
    del given.document["attention_bias"]
    assert given.read().config.attention_bias
    del given.tensors["midlayer.self_attn.k_proj.bias"]
    with pytest.raises(ConfigError, match=r"lacks midlayer\.self_attn\.k_proj\.bias"):
        given.read()


CONTRADICTIONS: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "biases": ({}, {"attention_bias": True}, "attention_bias true, .* lack .*q_proj.bias"),
    "no biases": (
        {"attention_bias": True},
        {"attention_bias": False},
        "attention_bias false, .* have .*q_proj.bias",
    ),
    "mlp": ({}, {"mlp_bias": True}, "mlp_bias true, .* lack .*gate_proj.bias"),
    "fc_norm": ({}, {"fc_norm": True}, "fc_norm true, .* lack fc_norm.0.weight"),
    "norm_before_fc": ({}, {"norm_before_fc": True}, "norm_before_fc true, .* lack .*input_norm"),
    "qwen3": (
        {},
        {"architectures": ["Eagle3Qwen3ForCausalLM"]},
        r"Eagle3Qwen3ForCausalLM'\], .* lack .*q_norm",
    ),
    "llama": (
        {"qk_norm": True},
        {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"},
        "model_type llama, .* have .*q_norm",
    ),
    "width": ({}, {"hidden_size": 96}, "has hidden_size 96, but the weights have 64"),
    "target": ({}, {"target_hidden_size": 32}, "reads 192 channels, with target_hidden_size 32"),
    "vocabulary": ({}, {"draft_vocab_size": 100}, "draft_vocab_size 100, but the weights have 200"),
    "window": (
        {},
        {"use_sliding_window": True, "sliding_window": 8},
        "has use_sliding_window but no layer_types",
    ),
    "mixed": (
        {"num_hidden_layers": 2},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        "our draft has the same attention in all layers",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_with_both_sides(given: Given, name: str) -> None:
    changes, said, expected = CONTRADICTIONS[name]
    given.make(changes).document |= said
    with pytest.raises(MismatchError, match=expected):
        given.read()


def test_a_window_that_engines_ignore_is_ignored(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    """As in configurations copied from a target: engines go by layer_types."""
    given.make().document |= {"sliding_window": 8}
    with caplog.at_level(logging.INFO):
        assert given.read().config.sliding_window is None
    assert "sliding_window 8 is ignored" in caplog.text
    given.document["layer_types"] = ["sliding_attention"] * 40
    assert given.read().config.sliding_window == 8
    given.document["layer_types"] = ["full_attention"] * 40
    assert given.read().config.sliding_window is None


def test_a_narrower_draft_must_bring_its_embedding(given: Given) -> None:
    given.make({"hidden_size": 32})
    del given.tensors["embed_tokens.weight"]
    with pytest.raises(ConfigError, match=r"lacks embed_tokens\.weight"):
        given.read()


def test_speculators_layers_are_described_in_their_own_part(given: Given) -> None:
    given.make({"qk_norm": True, "num_hidden_layers": 2}, "speculators")
    assert given.layer is not given.document
    given.layer["num_hidden_layers"] = 36
    assert given.read().config == given.config
    given.layer["model_type"] = "llama"
    with pytest.raises(MismatchError, match=r"model_type llama, .* have .*q_norm"):
        given.read()
