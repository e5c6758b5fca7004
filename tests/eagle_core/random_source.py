"""A small draft and a source of random states for it: what the trainer needs, without a target."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits, to_bfloat16_bits
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.samples import HiddenStateSample, sample_id

VOCAB_SIZE, HIDDEN_SIZE = 50, 16


def random_head(seed: int = 0) -> Tensor:
    """Return a target head [V, H]."""
    return torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def random_draft(seed: int = 0, **variant: Any) -> tuple[DraftModel, Tensor]:
    """Return an initialised draft and the target's head; `variant`: fields of its configuration."""
    head = random_head(seed)
    sizes = {
        "hidden_size": HIDDEN_SIZE,
        "target_hidden_size": HIDDEN_SIZE,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": 30,
    }
    draft = DraftModel(DraftConfig.model_validate({**sizes, **variant}))
    counts = np.arange(VOCAB_SIZE, dtype=np.int64)
    vocabulary = DraftVocabulary.build(counts, size=draft.config.draft_vocab_size)
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=seed)
    return draft, head


@dataclass(kw_only=True)
class RandomSource:
    """Samples of random length and states, the same for the same seed."""

    num_samples: int = 20
    seed: int = 0
    source_id: str = "random"
    poisoned: frozenset[int] = frozenset()
    """Samples whose aux states are not finite."""
    silent: frozenset[int] = frozenset()
    """Samples in which no position counts."""
    lengths: NDArray[np.int64] = field(init=False)
    groups: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.lengths = rng.integers(4, 20, self.num_samples)
        self.groups = np.sort(rng.integers(0, 5, self.num_samples))

    def origin(self, sample_id: str) -> str:
        return f"memory, as {sample_id[:8]}"

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
        """Do nothing: all is in memory."""

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index`."""
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        length = int(self.lengths[index])
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).numpy().astype(np.int32)
        mask = np.arange(length) >= (length if index in self.silent else 2)
        aux = torch.randn(length, 3, HIDDEN_SIZE, generator=generator)
        if index in self.poisoned:
            aux[0, 0, 0] = float("nan")
        last = to_bfloat16_bits(torch.randn(length, HIDDEN_SIZE, generator=generator))
        logits = from_bfloat16_bits(last, dtype=torch.float32) @ random_head(self.seed).T
        return HiddenStateSample(
            sample_id=sample_id(ids, mask),
            input_ids=ids,
            loss_mask=mask,
            aux_hidden_states=to_bfloat16_bits(aux),
            last_hidden_state=last,
            target_argmax=logits.argmax(dim=-1).to(torch.int32).numpy(),
            target_logsumexp=logits.logsumexp(dim=-1).numpy(),
        )
