"""Speculative decoding with a chain of drafts, and the plain decoding it must reproduce.

One round: the drafter proposes K tokens, the target scores the last token and all K in one cached
forward, the verdict keeps a prefix and adds the target's own token, both caches are cropped to what
is true, and the drafter sees the target's aux states of the kept tokens. The invariant: the tokens
are those of plain decoding. Under greedy decoding they are equal token for token up to the noise of
floating point (a forward over K+1 tokens may round differently from one over a single token, which
shows only where two logits nearly tie); at a temperature they follow the same distribution.

Prompts of any lengths are decoded side by side, each with its own positions and, at a temperature,
its own stream of random numbers: a text does not depend on the ones beside it. Rejected entries are
cropped where all rows reject them and hidden where some do; texts that have ended leave the batch.

Shapes: B batch, T tokens, S entries of a cache, H target hidden, V target vocabulary.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagle_core.decoding.chain_drafter import ChainDrafter, DraftNetwork, Proposal
from eagle_core.decoding.verification import Verdict, sample_token, verify_greedy, verify_sampled
from eagle_core.errors import ConfigError

_RECORD_PAST = "activate_past_recording"


class CroppableCache(Protocol):
    """A key-value cache that can forget its newest tokens (transformers' `DynamicCache`)."""

    def crop(self, tokens_to_remove: int, /) -> None:
        """Forget `-tokens_to_remove` tokens; a negative number or 0."""

    def batch_select_indices(self, indices: Tensor, /) -> None:
        """Forget all sequences but those at `indices`."""


CacheT = TypeVar("CacheT", bound=CroppableCache)


class CachedTarget(Protocol[CacheT]):
    """What speculative decoding asks of a target model; `TargetModel` is one."""

    device: torch.device

    @property
    def decodes_batches(self) -> bool:
        """Whether texts of different lengths can share a cache."""

    def forward_cached(
        self,
        input_ids: Tensor,
        past: CacheT | None,
        /,
        *,
        is_true: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, CacheT]:
        """Run ids [B, T] behind `past`; return (last [B, T, H], aux [B, T, 3H], grown cache).

        `is_true` [B, S + T] is False for entries that no token may see, `positions` [B, T] are the
        tokens' places in their texts; without them all S + T are tokens of texts of one length.
        """

    def logits(self, last: Tensor, /) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""


class DecodingConfig(BaseModel):
    """How text is decoded, plainly or speculatively."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    max_new_tokens: int = Field(
        default=64, gt=0, description="Most tokens generated for one prompt."
    )
    draft_tokens: int = Field(
        default=5, gt=0, le=32, description="K, tokens drafted for each forward of the target."
    )
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="0 decodes greedily; above, tokens are sampled, and rejection sampling keeps "
        "the target's own distribution.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of sampling; unused at temperature 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationRound:
    """What one target forward over a drafted chain gave."""

    verified: int
    """Drafted tokens with a known verdict: K, or fewer where a stop token ended the text."""
    accepted: int
    """Of these, the accepted ones."""
    gained: int
    """Tokens of the text: accepted + 1, or accepted where the stop token was itself drafted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationTrace:
    """One generated text and what it took."""

    tokens: tuple[int, ...]
    """The new tokens, a stop token included."""
    rounds: tuple[VerificationRound, ...] = ()
    """One for each verifying forward; empty when decoded plainly. The last one counts in full even
    where `max_new_tokens` cut its tokens, so that short texts do not look worse than long ones."""
    seconds: float
    """Wall time, prefill included; of texts decoded side by side, an equal share of it."""
    prefill_seconds: float
    """Of it, until the first token."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """Drafted tokens accepted in each round, 0..K."""
        return tuple(verification.accepted for verification in self.rounds)


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
    """Decode several prompts side by side, each with its own chains.

    Raises:
        ConfigError: a prompt is empty, or the target cannot decode several prompts at once.

    """
    batch = _Batch(target, prompts, config, stop_ids)
    drafter = ChainDrafter(
        draft,
        temperature=config.temperature,
        generators=[text.generator for text in batch.active] if config.temperature else (),
    )
    aux = batch.prefill()
    next_ids = [
        (*prompt[1:], text.tokens[-1]) for prompt, text in zip(prompts, batch.active, strict=True)
    ]
    while rows := batch.drop_ended():
        drafter.keep(rows)
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
) -> GenerationTrace:
    """Decode one token per target forward, as the target does on its own."""
    return generate_plain_batch(target, [prompt_ids], config, stop_ids)[0]


@torch.inference_mode()
def generate_plain_batch(
    target: CachedTarget[CacheT],
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: Collection[int] = (),
) -> list[GenerationTrace]:
    """Decode several prompts side by side, one token of each per target forward.

    Raises:
        ConfigError: a prompt is empty, or the target cannot decode several prompts at once.

    """
    batch = _Batch(target, prompts, config, stop_ids)
    batch.prefill()
    while batch.drop_ended():
        batch.extend()
    return batch.traces()


class _Text:
    """One text as it grows."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens: list[int] = []
        self.rounds: list[VerificationRound] = []


class _Batch(Generic[CacheT]):
    """Texts that are decoded side by side; `active` are those that have not ended."""

    def __init__(
        self,
        target: CachedTarget[CacheT],
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        stop_ids: Collection[int],
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
        self._target = target
        self._cache = _TargetCache(target)
        self._texts = [_Text(config.seed) for _ in prompts]
        self.active = list(self._texts)

    def prefill(self) -> Tensor:
        """Choose the first token of every text; return the prompts' aux states [B, T, 3H]."""
        last, aux = self._cache.run(self._prompts)
        ends = torch.tensor([len(prompt) - 1 for prompt in self._prompts], device=last.device)
        logits = self._target.logits(last[torch.arange(len(ends), device=last.device), ends])
        self._add_own(logits)
        self._prefill_seconds = time.perf_counter() - self._started
        return aux

    def drop_ended(self) -> list[int]:
        """Forget the texts that have ended; return the places that the others had."""
        rows = [row for row, text in enumerate(self.active) if not self._has_ended(text)]
        if rows and len(rows) < len(self.active):
            self._cache.keep(rows)
        self.active = [self.active[row] for row in rows]
        return rows

    def extend(self) -> None:
        """Add the target's own next token to every text."""
        last, _ = self._cache.run([text.tokens[-1:] for text in self.active])
        self._add_own(self._target.logits(last[:, -1]))

    def verify(self, proposals: Sequence[Proposal]) -> tuple[list[tuple[int, ...]], Tensor]:
        """Add what stands of every chain and the target's token behind it.

        Returns that, for each text, and the aux states [B, K + 1, 3H] of the tokens before each.
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
        self._cache.forget([self._config.draft_tokens - each.accepted for each in verdicts])
        chunks = []
        for text, proposal, verdict in zip(self.active, proposals, verdicts, strict=True):
            chunks.append((*proposal.tokens[: verdict.accepted], verdict.next_token))
            self._add_round(text, chunks[-1])
        return chunks, aux

    def traces(self) -> list[GenerationTrace]:
        """Return what became of every prompt, in the order they were given."""
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

    def _add_own(self, logits: Tensor) -> None:
        for text, row in zip(self.active, logits, strict=True):
            text.tokens.append(_pick(row, self._config.temperature, text.generator))

    def _add_round(self, text: _Text, chunk: Sequence[int]) -> None:
        """Add a chain's accepted tokens and the target's own, up to a stop token."""
        kept, num_accepted = _until_stop(chunk, self._stop_ids), len(chunk) - 1
        accepted = min(num_accepted, len(kept))
        ended_early = kept[-1] in self._stop_ids and len(kept) <= num_accepted
        text.rounds.append(
            VerificationRound(
                verified=accepted if ended_early else self._config.draft_tokens,
                accepted=accepted,
                gained=len(kept),
            )
        )
        text.tokens.extend(kept)

    def _has_ended(self, text: _Text) -> bool:
        is_full = len(text.tokens) >= self._config.max_new_tokens
        return is_full or text.tokens[-1] in self._stop_ids


class _TargetCache(Generic[CacheT]):
    """The target's cache of a batch, and which of its entries are tokens of their texts."""

    def __init__(self, target: CachedTarget[CacheT]) -> None:
        self._target = target
        self._past: CacheT | None = None
        self._is_true = torch.ones(0, 0, dtype=torch.bool, device=target.device)
        self._lengths = torch.zeros(0, dtype=torch.int64, device=target.device)

    def run(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Append tokens to every text; return (last [B, T, H], aux [B, T, 3H]), padded behind."""
        device = self._target.device
        input_ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        counts = torch.tensor([len(row) for row in ids], device=device)
        if self._past is None:
            # Behind a text there is nothing that it could see: padding needs no mask.
            self._is_true = torch.ones(len(ids), 0, dtype=torch.bool, device=device)
            self._lengths = torch.zeros_like(counts)
        steps = torch.arange(input_ids.shape[1], device=device)
        is_true = torch.cat([self._is_true, steps < counts.unsqueeze(1)], dim=1)
        if self._past is None or is_true.all():
            last, aux, self._past = self._target.forward_cached(input_ids, self._past)
        else:
            positions = self._lengths.unsqueeze(1) + steps
            last, aux, self._past = self._target.forward_cached(
                input_ids, self._past, is_true=is_true, positions=positions
            )
        if hasattr(self._past, _RECORD_PAST):  # else a full sliding window could not be cropped
            getattr(self._past, _RECORD_PAST)()
        self._is_true, self._lengths = is_true, self._lengths + counts
        return last, aux

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the newest tokens of every text, so many of each."""
        assert self._past is not None  # noqa: S101 (something ran)
        common = min(counts)
        self._past.crop(-common)
        self._is_true = self._is_true[:, : self._is_true.shape[1] - common]
        left = torch.tensor(counts, device=self._target.device)
        behind = torch.arange(self._is_true.shape[1], 0, -1, device=self._target.device)
        self._is_true = self._is_true & (behind > (left - common).unsqueeze(1))
        self._lengths = self._lengths - left

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the texts at `rows` alone."""
        assert self._past is not None  # noqa: S101 (something ran)
        kept = torch.tensor(rows, device=self._target.device)
        self._past.batch_select_indices(kept)
        self._is_true, self._lengths = self._is_true[kept], self._lengths[kept]


def _verify(
    proposal: Proposal, logits: Tensor, temperature: float, generator: torch.Generator
) -> Verdict:
    if proposal.probabilities is None:
        return verify_greedy(proposal.tokens, logits)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    return verify_sampled(proposal.tokens, proposal.probabilities, probabilities, generator)


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax().item())
    return sample_token(torch.softmax(logits.double() / temperature, dim=-1), generator)


def _until_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> Sequence[int]:
    """Return `tokens` up to and including the first stop token."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens
