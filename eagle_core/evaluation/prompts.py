"""Prompts for evaluation: the held-out samples, cut where an assistant turn begins.

A prompt that is too long is skipped, never cut: the target would answer another question.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from eagle_core.samples import TokenizedSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The input of a generation."""

    input_ids: tuple[int, ...]
    """Ends with the template's generation prompt."""
    category: str = ""
    """Group in reports; empty for none."""
    benchmark: str = ""
    """Name of the benchmark set; empty for none."""
    turn: int = 1
    """Of a benchmark's question: the answer that is due."""


def sample_prompts(
    samples: Iterable[TokenizedSample], *, num_prompts: int, max_tokens: int, max_turns: int = 1
) -> list[Prompt]:
    """Return prompts cut from tokenised conversations: exactly the tokens of training.

    The first `max_turns` assistant turns of each sample give one prompt each, with the category
    `turn N`; later turns keep the data's own earlier answers as context. Several answers to one
    question are one prompt: greedy texts would be equal, and intervals too narrow.
    """
    prompts = (
        Prompt(input_ids=tuple(sample.input_ids[:start].tolist()), category=f"turn {turn}")
        for sample in samples
        for turn, start in enumerate(turn_starts(sample)[:max_turns], start=1)
    )
    return first_prompts(_distinct(prompts), num_prompts=num_prompts, max_tokens=max_tokens)


def _distinct(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    seen: set[tuple[int, ...]] = set()
    for prompt in prompts:
        if prompt.input_ids not in seen:
            seen.add(prompt.input_ids)
            yield prompt


def turn_starts(sample: TokenizedSample) -> list[int]:
    """Return the index of the first supervised token of each assistant turn that has a prompt."""
    mask = sample.loss_mask.astype(np.int8)
    starts: list[int] = np.flatnonzero(np.diff(mask, prepend=0) == 1).tolist()
    return [start for start in starts if start > 0]


def first_prompts(prompts: Iterable[Prompt], *, num_prompts: int, max_tokens: int) -> list[Prompt]:
    """Return the first `num_prompts` of those with at most `max_tokens` tokens, in order."""
    short = (prompt for prompt in prompts if 0 < len(prompt.input_ids) <= max_tokens)
    return list(islice(short, num_prompts))
