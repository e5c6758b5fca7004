"""Samples of a target whose final state follows from two of its layers and the next token."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from eagle_core.bfloat16 import to_bfloat16_bits
from eagle_core.samples import HiddenStateSample, sample_id
from tests.eagle_core.closed_form.linear_source import random_matrix

LAYERS = (1, 3, 5, 7, 9)
TELLING = (3, 7)
"""The layers that the final state follows from."""
VOCAB_SIZE, HIDDEN_SIZE = 60, 16
EMBEDDING = random_matrix(1, VOCAB_SIZE, HIDDEN_SIZE)
HEAD = 4 * random_matrix(2, VOCAB_SIZE, HIDDEN_SIZE)
GAIN = torch.linspace(0.5, 2, HIDDEN_SIZE)
CHANNEL_SIZES = torch.logspace(-1, 2, HIDDEN_SIZE)


def samples(
    count: int, *, seed: int = 0, rank: int = HIDDEN_SIZE, noise: float = 0.0
) -> list[HiddenStateSample]:
    """Return `count` samples of 10 to 40 tokens; states of a layer have `rank` directions."""
    return [_sample(np.random.default_rng((seed, number)), rank, noise) for number in range(count)]


def _sample(rng: np.random.Generator, rank: int, noise: float) -> HiddenStateSample:
    length = int(rng.integers(10, 41))
    ids = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
    mask = rng.random(length) < 0.7
    hidden = _normal(rng, len(LAYERS), length, rank)
    directions = random_matrix(3, len(LAYERS), rank, HIDDEN_SIZE)
    aux = hidden @ directions * CHANNEL_SIZES
    final = _normal(rng, length, HIDDEN_SIZE)  # of the first token nothing is learnt
    final[1:] = (
        0.7
        * rms_norm(EMBEDDING[ids[1:]], (HIDDEN_SIZE,))
        @ random_matrix(4, HIDDEN_SIZE, HIDDEN_SIZE)
    )
    for layer in TELLING:
        final[1:] += hidden[LAYERS.index(layer), :-1] @ random_matrix(layer, rank, HIDDEN_SIZE)
    final += noise * _normal(rng, length, HIDDEN_SIZE)
    last = rms_norm(final, (HIDDEN_SIZE,)) * GAIN
    logits = last @ HEAD.T
    return HiddenStateSample(
        sample_id=sample_id(ids, mask),
        input_ids=ids,
        loss_mask=mask,
        aux_hidden_states=to_bfloat16_bits(aux.transpose(0, 1)),
        last_hidden_state=to_bfloat16_bits(last),
        target_argmax=logits.argmax(dim=-1).to(torch.int32).numpy(),
        target_logsumexp=logits.logsumexp(dim=-1).numpy(),
    )


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()
