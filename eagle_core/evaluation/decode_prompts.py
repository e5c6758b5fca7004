"""Evaluate a draft on held-out prompts, by real speculative decoding next to plain decoding.

This module generates; `eagle_core.evaluation.acceptance` aggregates the traces. Both decodings of a
batch run one after the other in the same process, so that their speeds can be compared.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from eagle_core.decoding.chain_drafter import DraftNetwork
from eagle_core.decoding.speculative import generate_plain_batch, generate_speculative_batch
from eagle_core.decoding.target_cache import CachedTarget, CacheT
from eagle_core.decoding.trace import GenerationTrace
from eagle_core.decoding.tree_speculative import (
    generate_tree,
    longest_with_tree,
    require_tree_logits,
)
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import PromptResult
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.prompts import Prompt

_WARM_UP_TOKENS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProgress:
    """Passed to the progress callback after each prompt."""

    num_done: int
    num_prompts: int
    result: PromptResult


def decode_prompts(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    *,
    stop_ids: Collection[int] = (),
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> Iterator[PromptResult]:
    """Decode each prompt speculatively and plainly; yield the results.

    Raises:
        ConfigError: there is no prompt, or the target cannot verify trees over the longest one.

    """
    chosen = prompts[: config.num_prompts]
    if not chosen:
        raise ConfigError(
            "no held-out prompt is left to evaluate; raise max_prompt_tokens or enlarge the split"
        )
    num_plain = len(chosen) if config.num_plain_prompts is None else config.num_plain_prompts
    require_trees(target, chosen, config)
    if config.tree is not None:
        require_tree_logits(target)
    warm_up = config.model_copy(update={"max_new_tokens": _WARM_UP_TOKENS})
    _speculative(
        target, draft, [chosen[0].input_ids], warm_up, ()
    )  # else the first prompt pays for the warm-up
    for first in range(0, len(chosen), config.batch_prompts):
        batch = chosen[first : first + config.batch_prompts]
        ids = [prompt.input_ids for prompt in batch]
        texts = _speculative(target, draft, ids, config, stop_ids)
        plain_ids = ids[: max(num_plain - first, 0)]
        plain_texts = generate_plain_batch(target, plain_ids, config, stop_ids) if plain_ids else []
        for place, (prompt, text, plain) in enumerate(zip_longest(batch, texts, plain_texts)):
            result = PromptResult(
                speculative=text,
                plain=plain,
                sampled=config.temperature > 0,
                category=prompt.category,
                mismatch_margin=None
                if config.temperature > 0
                else _margin(target, prompt.input_ids, text, plain),
            )
            if on_progress is not None:
                num_done = first + place + 1
                on_progress(
                    EvaluationProgress(num_done=num_done, num_prompts=len(chosen), result=result)
                )
            yield result


def require_trees(
    target: CachedTarget[CacheT], prompts: Sequence[Prompt], config: EvaluationConfig
) -> None:
    """Raise ConfigError if trees are to be drafted, and are not right over the longest text."""
    if config.tree is not None:
        longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
        target.require_tree(longest_with_tree(longest, config, config.tree))


def _speculative(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompts: Sequence[Sequence[int]],
    config: EvaluationConfig,
    stop_ids: Collection[int],
) -> list[GenerationTrace]:
    """Decode with chains in one batch, or with trees one after the other."""
    if config.tree is None:
        return generate_speculative_batch(target, draft, prompts, config, stop_ids)
    return [generate_tree(target, draft, ids, config, config.tree, stop_ids) for ids in prompts]


def _margin(
    target: CachedTarget[CacheT],
    prompt_ids: Sequence[int],
    speculative: GenerationTrace,
    plain: GenerationTrace | None,
) -> float | None:
    if plain is None or plain.tokens == speculative.tokens:
        return None
    return mismatch_margin(target, prompt_ids, plain.tokens, speculative.tokens)


@torch.inference_mode()
def mismatch_margin(
    target: CachedTarget[CacheT],
    prompt_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
) -> float:
    """Return the gap between the target's logits of two texts' first differing tokens.

    Zero for a perfect tie; infinity if one text is a prefix of the other.
    """
    pairs = list(zip(expected, found, strict=False))
    first = next((i for i, (left, right) in enumerate(pairs) if left != right), None)
    if first is None:
        return float("inf")
    ids = torch.tensor([[*prompt_ids, *expected[:first]]], device=target.device)
    last, _, _ = target.forward_cached(ids, None)
    logits = target.logits(last[0, -1])
    return abs(float(logits[expected[first]] - logits[found[first]]))
