"""Evaluation of a draft on held-out prompts, by real speculative decoding next to plain decoding.

Generation is here; what its traces mean is in `eagle_core.acceptance`. Both decodings of a prompt
run one after the other in the same process, so that their speeds can be compared.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from eagle_core.acceptance import AcceptanceReport, PromptResult, summarise
from eagle_core.drafting import DraftNetwork
from eagle_core.errors import ConfigError
from eagle_core.prompts import Prompt
from eagle_core.speculative import (
    CachedTarget,
    CacheT,
    DecodingConfig,
    GenerationTrace,
    generate_plain,
    generate_speculative,
)

_WARM_UP_TOKENS = 2


class EvaluationConfig(DecodingConfig):
    """How a draft is evaluated."""

    num_prompts: int = Field(
        default=16, gt=0, description="Held-out prompts that are decoded speculatively."
    )
    num_plain_prompts: int | None = Field(
        default=None,
        ge=0,
        description="Of these, the first ones that are decoded plainly too, to compare tokens and "
        "speed; empty means all, 0 none (which takes less than half the time).",
    )
    max_prompt_tokens: int = Field(
        default=1024, gt=0, description="Longer prompts are left out, not cut."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProgress:
    """Told after each prompt."""

    num_done: int
    num_prompts: int
    result: PromptResult


def evaluate(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    *,
    stop_ids: Collection[int] = (),
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> AcceptanceReport:
    """Return how well `draft` does on the first `num_prompts` of `prompts`."""
    results = list(
        decode_prompts(target, draft, prompts, config, stop_ids=stop_ids, on_progress=on_progress)
    )
    return summarise(results, draft_tokens=config.draft_tokens)


def decode_prompts(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    *,
    stop_ids: Collection[int] = (),
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> Iterator[PromptResult]:
    """Yield what decoding each prompt gave, speculatively and plainly.

    Raises:
        ConfigError: there is no prompt.

    """
    chosen = prompts[: config.num_prompts]
    if not chosen:
        raise ConfigError(
            "no held-out prompt is left to evaluate; raise max_prompt_tokens or the split"
        )
    num_plain = len(chosen) if config.num_plain_prompts is None else config.num_plain_prompts
    warm_up = config.model_copy(update={"max_new_tokens": _WARM_UP_TOKENS})
    generate_speculative(
        target, draft, chosen[0].input_ids, warm_up
    )  # else it pays for first calls
    for index, prompt in enumerate(chosen):
        speculative = generate_speculative(target, draft, prompt.input_ids, config, stop_ids)
        plain = None
        if index < num_plain:
            plain = generate_plain(target, prompt.input_ids, config, stop_ids)
        result = PromptResult(
            speculative=speculative,
            plain=plain,
            sampled=config.temperature > 0,
            category=prompt.category,
            mismatch_margin=None
            if config.temperature > 0
            else _margin(target, prompt.input_ids, speculative, plain),
        )
        if on_progress is not None:
            on_progress(
                EvaluationProgress(num_done=index + 1, num_prompts=len(chosen), result=result)
            )
        yield result


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
    """Return how far apart the target's logits of two texts are where they first differ.

    Zero for a perfect tie; infinity when one text merely ends before the other.
    """
    pairs = list(zip(expected, found, strict=False))
    first = next((i for i, (left, right) in enumerate(pairs) if left != right), None)
    if first is None:
        return float("inf")
    ids = torch.tensor([[*prompt_ids, *expected[:first]]], device=target.device)
    last, _, _ = target.forward_cached(ids, None)
    logits = target.logits(last[0, -1])
    return abs(float(logits[expected[first]] - logits[found[first]]))
