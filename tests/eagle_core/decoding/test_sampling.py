"""Limits of sampling choose the tokens that transformers would choose."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.sampling import pick_token, stream_seed
from eagle_core.decoding.sampling_limits import NO_LIMITS, SamplingLimits
from eagle_core.decoding.speculative import generate_plain
from tests.eagle_core.decoding.float64_target import load_float64_target

LOGITS = torch.tensor([0.0, 3.0, 2.9, 2.0, -1.0])


def picked(limits: SamplingLimits, *, ids: tuple[int, ...] = (4,)) -> set[int]:
    """Return the tokens that 300 draws give."""
    generator = torch.Generator().manual_seed(0)
    return {
        pick_token(LOGITS, ids, temperature=1.5, limits=limits, generator=generator)
        for _ in range(300)
    }


def test_without_limits_every_token_is_drawn() -> None:
    assert picked(NO_LIMITS) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (SamplingLimits(top_k=1), {1}),
        (SamplingLimits(top_k=3), {1, 2, 3}),
        (SamplingLimits(top_p=0.1), {1}),
        (SamplingLimits(top_p=0.6), {1, 2}),  # 0.39 and 0.36 of what the temperature leaves
        (SamplingLimits(top_p=0.99, top_k=2), {1, 2}),
        (SamplingLimits(top_k=1, repetition_penalty=1.2), {2}),
    ],
)
def test_a_limit_leaves_the_most_likely(limits: SamplingLimits, expected: set[int]) -> None:
    assert picked(limits, ids=(1,)) == expected


def test_every_prompt_and_seed_has_a_stream_of_its_own() -> None:
    """And always the same: a stored text can be decoded again."""
    prompts = [(1,), (1, 2), (12,), (2, 1), (1, 2, 3)]
    seeds = {stream_seed(seed, prompt) for seed in (0, 1, 11) for prompt in prompts}
    assert len(seeds) == 15
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert stream_seed(7, [5, 17, 90]) == 769927918


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_a_penalised_greedy_text_is_that_of_transformers(
    tiny_target_path: Path, penalty: float
) -> None:
    target = load_float64_target(tiny_target_path)
    prompt = [5, 17, 90, 33, 8, 120]
    ours = generate_plain(
        target,
        prompt,
        DecodingConfig(max_new_tokens=24),
        limits=SamplingLimits(repetition_penalty=penalty),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_target_path, dtype=torch.float64)
    theirs = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        repetition_penalty=penalty,
        max_new_tokens=24,
        eos_token_id=None,
    )
    assert list(ours.tokens) == theirs[0, len(prompt) :].tolist()
