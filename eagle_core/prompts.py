"""Prompts for evaluation: the held-out conversations, cut where the assistant is about to speak.

A prompt that is too long is left out, never cut: the target would answer another question.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from eagle_core.conversations import Conversation
from eagle_core.samples import TokenizedSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a text is generated from."""

    input_ids: tuple[int, ...]
    """Ends with the template's generation prompt."""
    category: str = ""
    """What reports group by; empty for none."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that renders prompts."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        /,
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
    ) -> Sequence[int]:
        """Return the token ids of the conversation."""


def held_out_prompts(
    conversations: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    *,
    num_prompts: int,
    max_tokens: int,
    categories: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Return the first `num_prompts` prompts of at most `max_tokens` tokens, in order.

    A prompt is everything before the first assistant turn, then the generation prompt.
    `categories` maps conversation ids to the groups of the report.
    """
    prompts = (
        Prompt(
            input_ids=opening_ids(conversation, tokenizer),
            category=(categories or {}).get(conversation.conversation_id, ""),
        )
        for conversation in conversations
    )
    return list(islice(_short_enough(prompts, max_tokens), num_prompts))


def opening_ids(conversation: Conversation, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Return the ids before the first assistant turn, generation prompt included."""
    opening: list[dict[str, str]] = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        opening.append({"role": message.role, "content": message.content})
    ids = tokenizer.apply_chat_template(
        opening, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(ids)


def sample_prompts(
    samples: Iterable[TokenizedSample], *, num_prompts: int, max_tokens: int, max_turns: int = 1
) -> list[Prompt]:
    """Return prompts cut from tokenised conversations: what the draft was trained on, to the token.

    The first `max_turns` assistant turns of each sample give one prompt each, with the category
    `turn N`; later turns keep the data's own earlier answers as context.
    """
    prompts = (
        Prompt(input_ids=tuple(sample.input_ids[:start].tolist()), category=f"turn {turn}")
        for sample in samples
        for turn, start in enumerate(turn_starts(sample)[:max_turns], start=1)
    )
    return list(islice(_short_enough(prompts, max_tokens), num_prompts))


def turn_starts(sample: TokenizedSample) -> list[int]:
    """Return the index of the first supervised token of each assistant turn that has a prompt."""
    mask = sample.loss_mask.astype(np.int8)
    starts: list[int] = np.flatnonzero(np.diff(mask, prepend=0) == 1).tolist()
    return [start for start in starts if start > 0]


def _short_enough(prompts: Iterable[Prompt], max_tokens: int) -> Iterator[Prompt]:
    return (prompt for prompt in prompts if 0 < len(prompt.input_ids) <= max_tokens)
