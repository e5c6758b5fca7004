"""Speculative decoding with drafted chains, and the plain decoding it must reproduce.

One round: the drafter proposes K tokens, the target scores the last token and all K in one cached
forward, the verdict keeps a prefix and adds the target's own token, both caches are rolled back to
the kept tokens, and the drafter observes the target's aux states of these. Invariant: the tokens
are those of plain decoding. Greedy texts are equal token for token up to floating-point noise (a
forward over K+1 tokens may round differently from one over a single token, which matters only where
two logits nearly tie); at a temperature above 0 they follow the same distribution.

Prompts of any lengths are decoded in one batch, each with its own positions and, at a temperature
above 0, its own stream of random numbers: a text does not depend on the others of its batch.
Rejected entries are cropped where all rows reject them and hidden where only some do; finished
texts leave the batch.

Shapes: B batch, T tokens, S entries of a cache, H target hidden, V target vocabulary.
"""

import time
from collections.abc import Collection, Sequence
from typing import Generic

import torch
from torch import Tensor

from eagle_core.decoding.chain_drafter import ChainDrafter, DraftNetwork, Proposal
from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.sampling import pick_token, stream_seed
from eagle_core.decoding.sampling_limits import NO_LIMITS, SamplingLimits
from eagle_core.decoding.target_cache import CachedTarget, CacheT, TargetCache
from eagle_core.decoding.trace import GenerationTrace, VerificationRound, kept_round
from eagle_core.decoding.verification import Verdict, verify_greedy, verify_sampled
from eagle_core.errors import ConfigError


def generate_speculative(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompt_ids: Sequence[int],
    config: DecodingConfig,
    stop_ids: Collection[int] = (),
) -> GenerationTrace:
    """Decode with drafted chains until a stop token or `max_new_tokens`."""
    return generate_speculative_batch(target, draft, [prompt_ids], config, stop_ids)[0]


@torch.inference_mode()
def generate_speculative_batch(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: Collection[int] = (),
) -> list[GenerationTrace]:
    """Decode several prompts in one batch, each with its own chains.

    Raises:
        ConfigError: a prompt is empty, the target cannot decode several prompts at once, or its
            cache cannot drop rejected tokens.

    """
    batch = _Batch(target, prompts, config, stop_ids)
    drafter = ChainDrafter(
        draft,
        temperature=config.temperature,
        generators=[text.generator for text in batch.active] if config.temperature else (),
    )
    aux = batch.prefill()
    batch.require_rollback()
    next_ids = [
        (*prompt[1:], text.tokens[-1]) for prompt, text in zip(prompts, batch.active, strict=True)
    ]
    while rows := batch.drop_ended():
        drafter.select(rows)
        drafter.observe(
            [next_ids[row] for row in rows], [aux[row, : len(next_ids[row])] for row in rows]
        )
        next_ids, aux = batch.verify(drafter.propose(config.draft_tokens))
    return batch.traces()


def generate_plain(
    target: CachedTarget[CacheT],
    prompt_ids: Sequence[int],
    config: DecodingConfig,
    stop_ids: Collection[int] = (),
    limits: SamplingLimits = NO_LIMITS,
) -> GenerationTrace:
    """Decode one token per target forward, as the target does without a draft."""
    return generate_plain_batch(target, [prompt_ids], config, stop_ids, limits)[0]


@torch.inference_mode()
def generate_plain_batch(
    target: CachedTarget[CacheT],
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: Collection[int] = (),
    limits: SamplingLimits = NO_LIMITS,
) -> list[GenerationTrace]:
    """Decode several prompts in one batch, one token of each per target forward.

    Raises:
        ConfigError: a prompt is empty, or the target cannot decode several prompts at once.

    """
    batch = _Batch(target, prompts, config, stop_ids, limits)
    batch.prefill()
    while batch.drop_ended():
        batch.extend()
    return batch.traces()


class _Text:
    """One text during decoding."""

    def __init__(self, prompt: Sequence[int], seed: int) -> None:
        self.prompt = prompt
        self.generator = torch.Generator().manual_seed(stream_seed(seed, prompt))
        self.tokens: list[int] = []
        self.rounds: list[VerificationRound] = []


class _Batch(Generic[CacheT]):
    """Texts that are decoded in one batch; `active` are the unfinished ones."""

    def __init__(
        self,
        target: CachedTarget[CacheT],
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        stop_ids: Collection[int],
        limits: SamplingLimits = NO_LIMITS,
    ) -> None:
        if not all(prompts):
            raise ConfigError("cannot decode from an empty prompt: give at least one token")
        if len(prompts) > 1 and not target.decodes_batches:
            raise ConfigError(
                "this target cannot decode several prompts at once: it has layers with a sliding "
                "window, which would see other tokens; set evaluation.batch_prompts to 1"
            )
        self._started = time.perf_counter()
        self._prefill_seconds = 0.0
        self._prompts, self._config, self._stop_ids = prompts, config, stop_ids
        self._limits = limits
        self._target = target
        self._cache = TargetCache(target)
        self._texts = [_Text(prompt, config.seed) for prompt in prompts]
        self.active = list(self._texts)

    def prefill(self) -> Tensor:
        """Choose the first token of every text; return the prompts' aux states [B, T, 3H]."""
        last, aux = self._cache.run(self._prompts)
        ends = torch.tensor([len(prompt) - 1 for prompt in self._prompts], device=last.device)
        logits = self._target.logits(last[torch.arange(len(ends), device=last.device), ends])
        self._append_target_token(logits)
        self._prefill_seconds = time.perf_counter() - self._started
        return aux

    def require_rollback(self) -> None:
        """Raise ConfigError if rejected tokens would leave traces in the cache."""
        self._cache.require_croppable()

    def drop_ended(self) -> list[int]:
        """Drop the finished texts; return the former rows of the others."""
        rows = [row for row, text in enumerate(self.active) if not self._has_ended(text)]
        if rows and len(rows) < len(self.active):
            self._cache.select(rows)
        self.active = [self.active[row] for row in rows]
        return rows

    def extend(self) -> None:
        """Append the target's own next token to every text."""
        last, _ = self._cache.run([text.tokens[-1:] for text in self.active])
        self._append_target_token(self._target.logits(last[:, -1]))

    def verify(self, proposals: Sequence[Proposal]) -> tuple[list[tuple[int, ...]], Tensor]:
        """Append the accepted tokens of every chain and the target's token after them.

        Returns these tokens for each text, and the aux states [B, K + 1, 3H] of the token before
        each.
        """
        drafted = [
            [text.tokens[-1], *proposal.tokens]
            for text, proposal in zip(self.active, proposals, strict=True)
        ]
        last, aux = self._cache.run(drafted)
        logits = self._target.logits(last)
        verdicts = [
            _verify(proposal, row, self._config.temperature, text.generator)
            for proposal, row, text in zip(proposals, logits, self.active, strict=True)
        ]
        self._cache.rollback([self._config.draft_tokens - each.accepted for each in verdicts])
        chunks = []
        for text, proposal, verdict in zip(self.active, proposals, verdicts, strict=True):
            chunks.append((*proposal.tokens[: verdict.accepted], verdict.next_token))
            self._add_round(text, chunks[-1])
        return chunks, aux

    def traces(self) -> list[GenerationTrace]:
        """Return the trace of every prompt, in the given order."""
        seconds = time.perf_counter() - self._started
        return [
            GenerationTrace(
                tokens=tuple(text.tokens[: self._config.max_new_tokens]),
                rounds=tuple(text.rounds),
                seconds=seconds / len(self._texts),
                prefill_seconds=self._prefill_seconds / len(self._texts),
            )
            for text in self._texts
        ]

    def _append_target_token(self, logits: Tensor) -> None:
        for text, row in zip(self.active, logits, strict=True):
            token = pick_token(
                row,
                [*text.prompt, *text.tokens],
                temperature=self._config.temperature,
                limits=self._limits,
                generator=text.generator,
            )
            text.tokens.append(token)

    def _add_round(self, text: _Text, chunk: Sequence[int]) -> None:
        """Append a chain's accepted tokens and the target's own, up to a stop token."""
        kept, verification = kept_round(
            chunk,
            accepted=len(chunk) - 1,
            drafted=self._config.draft_tokens,
            stop_ids=self._stop_ids,
        )
        text.rounds.append(verification)
        text.tokens.extend(kept)

    def _has_ended(self, text: _Text) -> bool:
        is_full = len(text.tokens) >= self._config.max_new_tokens
        return is_full or text.tokens[-1] in self._stop_ids


def _verify(
    proposal: Proposal, logits: Tensor, temperature: float, generator: torch.Generator
) -> Verdict:
    if proposal.probabilities is None:
        return verify_greedy(proposal.tokens, logits)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    return verify_sampled(proposal.tokens, proposal.probabilities, probabilities, generator)
