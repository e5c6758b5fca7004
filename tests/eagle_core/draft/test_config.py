"""The sizes of a draft follow from its target's configuration."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import (
    CohereConfig,
    Lfm2Config,
    LlamaConfig,
    PretrainedConfig,
    StableLmConfig,
    Starcoder2Config,
)

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.settings import DraftSettings
from eagle_core.errors import ConfigError, MismatchError
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


WIDE = LlamaConfig(
    **SIZES | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
    head_dim=64,
)


def sizes(**settings: object) -> tuple[int, ...]:
    """Return width, feed-forward width, query heads, key-value heads and head size."""
    config = DraftConfig.from_target(
        WIDE, draft_vocab_size=32, settings=DraftSettings.model_validate(settings)
    )
    return (
        *(config.hidden_size, config.intermediate_size),
        *(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
    )


def test_what_settings_leave_open_follows_from_the_target() -> None:
    feed_forward = SIZES["intermediate_size"]
    assert sizes() == (512, feed_forward, 8, 4, 64)
    assert sizes(hidden_size=256) == (256, feed_forward // 2, 4, 4, 64)
    assert sizes(hidden_size=192) == (192, round(feed_forward * 192 / 512), 3, 3, 64)
    assert sizes(hidden_size=32) == (32, feed_forward // 16, 1, 1, 64)
    assert sizes(num_attention_heads=2) == (512, feed_forward, 2, 2, 64)
    assert sizes(hidden_size=448, head_dim=128) == (448, round(feed_forward * 448 / 512), 2, 2, 128)
    assert sizes(hidden_size=200) == (200, round(feed_forward * 200 / 512), 2, 2, 64)
    assert sizes(head_dim=32, intermediate_size=100) == (512, 100, 8, 4, 32)


def test_sizes_that_contradict_each_other_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"3 key-value heads for 8 .* draft.num_key_value_heads"):
        sizes(num_key_value_heads=3)
    with pytest.raises(ConfigError, match=r"512 cannot have 6 .* draft.num_attention_heads to 4"):
        sizes(num_attention_heads=6)
    with pytest.raises(ConfigError, match=r"target_head .* \(512\), but draft.hidden_size is 256"):
        sizes(target_head=True, hidden_size=256)


def test_heads_that_engines_refuse_are_chosen_only_with_norms_of_queries_and_keys() -> None:
    uneven = PretrainedConfig(
        **SIZES | {"hidden_size": 4096, "num_attention_heads": 96, "num_key_value_heads": 8},
        head_dim=128,
    )
    plain = DraftConfig.from_target(uneven, draft_vocab_size=32)
    assert (plain.num_attention_heads, plain.num_key_value_heads) == (64, 8)
    normed = DraftConfig.from_target(
        uneven, draft_vocab_size=32, settings=DraftSettings(qk_norm=True)
    )
    assert (normed.num_attention_heads, normed.num_key_value_heads) == (96, 8)


def test_a_checkpoint_of_a_newer_version_is_named() -> None:
    plain = DraftConfig.from_target(LlamaConfig(**SIZES), draft_vocab_size=32)
    with pytest.raises(MismatchError, match=r"step-7 records a draft .* know \(experts: Extra"):
        DraftConfig.of_identity({**plain.identity(), "experts": 4}, where=Path("step-7"))


def test_a_head_of_the_target_has_its_whole_vocabulary() -> None:
    config = DraftConfig.from_target(
        WIDE, draft_vocab_size=32, settings=DraftSettings(target_head=True)
    )
    assert config.draft_vocab_size == WIDE.vocab_size
    assert config.target_head


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_a_draft_scales_its_rotary_embedding_as_its_target_does() -> None:
    target = LlamaConfig(**SIZES, rope_parameters=SCALED)
    config = DraftConfig.from_target(target, draft_vocab_size=32)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == {k: v for k, v in SCALED.items() if k != "rope_theta"}
    plain = DraftConfig.from_target(
        target, draft_vocab_size=32, settings=DraftSettings(rope_scaling="none")
    )
    assert plain == config.model_copy(update={"rope_scaling": None})
    longer = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert DraftConfig.from_target(longer, draft_vocab_size=32).rope_scaling is None


def test_a_scaling_that_engines_do_not_agree_on_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strange = {**SCALED, "rope_type": "yarn"}
    target = LlamaConfig(**SIZES, rope_parameters=strange)
    assert DraftConfig.from_target(target, draft_vocab_size=32).rope_scaling is None
    assert "plain rotary embedding, unlike its target: rope_scaling of type yarn" in caplog.text


def test_a_layer_that_no_engine_has_is_refused() -> None:
    with pytest.raises(ValidationError, match="qk_norm and mlp_bias do not go together"):
        DraftSettings(qk_norm=True, mlp_bias=True)
