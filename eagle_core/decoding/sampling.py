"""How the next token is chosen from the target's logits.

The limits (`sampling_limits`) act in transformers' order: the penalty, the temperature, top-k, then
top-p.

Shapes: V target vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from eagle_core.decoding.sampling_limits import SamplingLimits
from eagle_core.decoding.verification import sample_token


def stream_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """Return the seed of a prompt's own random numbers: 31 bits, which every engine accepts.

    It depends on nothing but these: neither on other prompts nor on their order. Prompts that share
    random numbers would be accepted and rejected together, and an interval over them too narrow.
    """
    text = f"{seed} {' '.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def pick_token(
    logits: Tensor,
    ids: Sequence[int],
    *,
    temperature: float,
    limits: SamplingLimits,
    generator: torch.Generator,
) -> int:
    """Return the token after `ids`, the prompt and the text so far, from `logits` [V]."""
    scores = logits[None]
    so_far = torch.tensor([ids], device=logits.device)
    if limits.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(limits.repetition_penalty)(so_far, scores)
    if temperature == 0:
        return int(scores[0].argmax().item())
    scores = scores.double() / temperature
    if limits.top_k is not None:
        scores = TopKLogitsWarper(limits.top_k)(so_far, scores)
    if limits.top_p < 1:
        scores = TopPLogitsWarper(limits.top_p)(so_far, scores)
    return sample_token(torch.softmax(scores[0], dim=-1), generator)
