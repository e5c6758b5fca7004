"""The sizes of a draft follow from its target's configuration."""

import pytest
from transformers import (
    CohereConfig,
    Lfm2Config,
    LlamaConfig,
    PretrainedConfig,
    StableLmConfig,
    Starcoder2Config,
)

from eagle_core.draft.config import DraftConfig
from tests.tiny import SIZES


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (LlamaConfig(**SIZES, rms_norm_eps=3e-5), 3e-5),
        (LlamaConfig(**SIZES, rms_norm_eps=3e-5, layer_norm_eps=1e-3), 3e-5),
        (Lfm2Config(**SIZES, norm_eps=4e-5), 4e-5),
        (StableLmConfig(**SIZES, layer_norm_eps=5e-5), 5e-5),
        (CohereConfig(**SIZES, layer_norm_eps=6e-5), 6e-5),
        (Starcoder2Config(**SIZES, norm_epsilon=7e-5), 1e-6),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_epsilon_of_the_norm_is_the_targets(target: PretrainedConfig, expected: float) -> None:
    assert DraftConfig.from_target(target, draft_vocab_size=32).rms_norm_eps == expected


def test_checkpoints_of_older_versions_have_the_identity_of_a_plain_draft() -> None:
    plain = DraftConfig.from_target(LlamaConfig(**SIZES), draft_vocab_size=32)
    assert set(plain.identity()) == {
        *("hidden_size", "target_hidden_size", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size", "rms_norm_eps"),
        *("rope_theta", "max_position_embeddings", "fc_norm", "norm_output"),
    }
    assert DraftConfig.model_validate(plain.identity()) == plain


def test_the_identity_of_a_draft_names_what_sets_it_apart() -> None:
    plain = DraftConfig.from_target(LlamaConfig(**SIZES), draft_vocab_size=32)
    windowed = plain.model_copy(update={"sliding_window": 64, "qk_norm": True})
    assert windowed.identity() == {**plain.identity(), "sliding_window": 64, "qk_norm": True}
