"""Samples of a target whose states are a linear recurrence: what a closed form can find exactly."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.bfloat16 import to_bfloat16_bits
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.samples import HiddenStateSample, sample_id

VOCAB_SIZE, HIDDEN_SIZE = 60, 32
DRAFT_VOCAB_SIZE = 50


def random_matrix(seed: int, *shape: int) -> Tensor:
    """Return a random matrix that about keeps the size of what it is multiplied with."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def small_draft(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    num_aux: int | None = None,
    intermediate_size: int = 96,
    **settings: Any,
) -> DraftModel:
    """Return a drawn draft for `LinearSource`; `settings` are fields of its configuration."""
    sizes = {
        "hidden_size": HIDDEN_SIZE,
        "target_hidden_size": HIDDEN_SIZE,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
    }
    config = DraftConfig.model_validate({**sizes, **settings})
    draft = DraftModel(config)
    if num_aux is not None:
        draft.fc = torch.nn.Linear(num_aux, HIDDEN_SIZE, bias=False)
    vocabulary = DraftVocabulary.build(
        np.arange(VOCAB_SIZE, dtype=np.int64), size=config.draft_vocab_size
    )
    draft.initialise(embedding=EMBEDDING, lm_head=HEAD, vocabulary=vocabulary, seed=seed)
    return draft


EMBEDDING = random_matrix(1, VOCAB_SIZE, HIDDEN_SIZE)
HEAD = 4 * random_matrix(2, VOCAB_SIZE, HIDDEN_SIZE)
GAIN = torch.linspace(0.5, 2, HIDDEN_SIZE)
"""Of the target's final norm."""
CHANNEL_SIZES = torch.logspace(-2, 3, 3 * HIDDEN_SIZE)
"""Of the aux channels."""


@dataclass(kw_only=True)
class LinearSource:
    """Samples in which the next final state follows from the last one and the next token."""

    num_samples: int = 120
    seed: int = 0
    source_id: str = "linear"
    longest: int = 40
    gain: Tensor = field(default_factory=lambda: GAIN)
    num_fetched: int = 0
    lengths: NDArray[np.int64] = field(init=False)
    groups: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.lengths = rng.integers(min(10, self.longest), self.longest + 1, self.num_samples)
        self.groups = np.sort(rng.integers(0, 6, self.num_samples))

    def origin(self, sample_id: str) -> str:
        return f"memory, as {sample_id[:8]}"

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
        """Do nothing: all is in memory."""

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index`."""
        self.num_fetched += 1
        rng = np.random.default_rng((self.seed, index))
        length = int(self.lengths[index])
        ids = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
        embedded = torch.nn.functional.rms_norm(EMBEDDING[ids], (HIDDEN_SIZE,))
        states = [embedded[0]]
        for position in range(1, length):
            state = CARRY @ states[-1] + EMBED @ embedded[position]
            states.append(torch.nn.functional.rms_norm(state, (HIDDEN_SIZE,)))
        normed = torch.stack(states)
        noise = torch.from_numpy(rng.standard_normal((length, HIDDEN_SIZE))).float()
        aux = torch.cat([normed @ MIX.T, torch.full((length, 1), 9.0), noise], dim=1)
        aux = aux[:, : 3 * HIDDEN_SIZE] * CHANNEL_SIZES
        last = normed * self.gain
        logits = last @ HEAD.T
        mask = np.arange(length) >= 2
        return HiddenStateSample(
            sample_id=sample_id(ids, mask),
            input_ids=ids,
            loss_mask=mask,
            aux_hidden_states=to_bfloat16_bits(aux.unflatten(1, (3, HIDDEN_SIZE))),
            last_hidden_state=to_bfloat16_bits(last),
            target_argmax=logits.argmax(dim=-1).to(torch.int32).numpy(),
            target_logsumexp=logits.logsumexp(dim=-1).numpy(),
        )


_RANK = 6
CARRY = 2 * random_matrix(3, HIDDEN_SIZE, _RANK) @ random_matrix(4, _RANK, HIDDEN_SIZE)
EMBED = 2 * random_matrix(6, HIDDEN_SIZE, _RANK) @ random_matrix(7, _RANK, HIDDEN_SIZE)
"""Of few directions, as those of real states are: a draft's heads hold no more."""
MIX = random_matrix(5, 2 * HIDDEN_SIZE - 1, HIDDEN_SIZE)
"""Aux states are a mixture of the final state, a constant, and noise."""
