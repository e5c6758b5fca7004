"""Every target that has a recipe, by its real architecture: real code, no weights (meta device)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from deployments.recipe import Recipe, load_recipe, recipe_names
from eagle_core.data.conversation import Conversation, Message
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.target import weights
from eagle_core.target.model_config import aux_layers, read_model_config
from eagle_core.target.tokenizer import conversation_tokenizer
from flows.tasks.preflight import _raw_bytes_per_token
from tests.deployments.architectures import ARCHITECTURES, Architecture
from tests.eagle_core.tokenization.test_template_families import train

SHARD_BYTES = range(100 * 10**6, 600 * 10**6)
"""Small enough to lose to a kill and to hold eight of, large enough for object stores."""
SHAREGPT_TOKENS = 120e6
ANSWER = "Falcons do."
CORPUS = ["Who flies fastest?\n", f"{ANSWER}\n"] * 20


@pytest.fixture(params=recipe_names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def architecture(name: str) -> Architecture:
    return ARCHITECTURES[name]  # a new recipe needs an entry there


@pytest.fixture
def recipe(name: str, architecture: Architecture, tmp_path: Path) -> Recipe:
    """The recipe, with its model where a config.json and a small tokenizer of its kind lie."""
    (tmp_path / "config.json").write_text(json.dumps(architecture.config))
    (tmp_path / "model.safetensors").touch()
    train(architecture.template, CORPUS).save_pretrained(tmp_path)
    return load_recipe(name, [f"target.model={tmp_path}"])


def test_its_states_are_those_of_its_architecture(
    recipe: Recipe, architecture: Architecture
) -> None:
    folder = weights.locate(recipe.target)
    text = read_model_config(recipe.target, folder)
    assert aux_layers(recipe.target, text.num_hidden_layers) == architecture.aux_layers
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), attn_implementation=recipe.target.attention
        )
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx(architecture.billions, rel=1e-3)
    decoder = model.get_decoder()
    assert type(decoder).__name__ == architecture.decoder
    assert len(decoder.layers) == text.num_hidden_layers
    head = model.get_output_embeddings().weight
    assert head.shape == (architecture.vocab_size, text.hidden_size)


def test_its_draft_has_its_width(recipe: Recipe, architecture: Architecture) -> None:
    text = read_model_config(recipe.target, weights.locate(recipe.target))
    draft = DraftConfig.from_target(text, draft_vocab_size=recipe.training.draft_vocab_size)
    assert draft.hidden_size == draft.target_hidden_size == text.hidden_size
    assert (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim) == (
        architecture.heads
    )
    assert draft.intermediate_size == architecture.intermediate_size
    assert draft.vocab_size == architecture.vocab_size
    assert draft.rope_theta == architecture.rope_theta
    assert draft.draft_vocab_size == recipe.training.draft_vocab_size < architecture.vocab_size
    with torch.device("meta"):
        model = DraftModel(draft)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["fc.weight"] == (text.hidden_size, 3 * text.hidden_size)
    assert shapes["lm_head.weight"] == (recipe.training.draft_vocab_size, text.hidden_size)


def test_its_template_supervises_the_answer_and_its_end(
    recipe: Recipe, architecture: Architecture
) -> None:
    tokenizer = conversation_tokenizer(recipe.target)
    question, answer = (
        Message(role="user", content="Who?"),
        Message(role="assistant", content=ANSWER),
    )
    (sample,) = tokenizer.tokenize(Conversation(conversation_id="c", messages=(question, answer)))
    supervised = tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert supervised.replace("▁", " ").endswith(f"{ANSWER}{architecture.end_of_turn}")
    assert "Who?" not in supervised


def test_its_shards_are_of_a_size_that_can_be_lost_and_kept(
    recipe: Recipe, architecture: Architecture
) -> None:
    per_token = _raw_bytes_per_token(recipe.target, recompute=False)
    assert per_token == architecture.bytes_per_token
    if recipe.target.name == "smollm2":  # a demo of some minutes
        return
    assert recipe.store.shard_tokens * per_token in SHARD_BYTES
    tasks = SHAREGPT_TOKENS / (recipe.store.shard_tokens * recipe.store.shards_per_task)
    assert 50 <= tasks <= 300, f"{tasks:.0f} task runs for ShareGPT"
