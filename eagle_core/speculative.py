"""Speculative decoding with a chain of drafts, and the plain decoding it must reproduce.

One round: the drafter proposes K tokens, the target scores the last token and all K in one cached
forward, the verdict keeps a prefix and adds the target's own token, both caches are cropped to what
is true, and the drafter sees the target's aux states of the kept tokens. The invariant: the tokens
are those of plain decoding. Under greedy decoding they are equal token for token up to the noise of
floating point (a forward over K+1 tokens may round differently from one over a single token, which
shows only where two logits nearly tie); at a temperature they follow the same distribution.

Shapes: B batch (1), T tokens, H target hidden, V target vocabulary.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eagle_core.drafting import ChainDrafter, DraftNetwork, Proposal
from eagle_core.errors import ConfigError
from eagle_core.verification import Verdict, sample_token, verify_greedy, verify_sampled

_RECORD_PAST = "activate_past_recording"


class CroppableCache(Protocol):
    """A key-value cache that can forget its newest tokens (transformers' `DynamicCache`)."""

    def crop(self, tokens_to_remove: int, /) -> None:
        """Forget `-tokens_to_remove` tokens; a negative number or 0."""


CacheT = TypeVar("CacheT", bound=CroppableCache)


class CachedTarget(Protocol[CacheT]):
    """What speculative decoding asks of a target model; `TargetModel` is one."""

    device: torch.device

    def forward_cached(
        self, input_ids: Tensor, past: CacheT | None, /
    ) -> tuple[Tensor, Tensor, CacheT]:
        """Run ids [B, T] behind `past`; return (last [B, T, H], aux [B, T, 3H], grown cache)."""

    def logits(self, last: Tensor, /) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""


class DecodingConfig(BaseModel):
    """How text is decoded, plainly or speculatively."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    """Wall time, prefill included."""
    prefill_seconds: float
    """Of it, until the first token."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """Drafted tokens accepted in each round, 0..K."""
        return tuple(verification.accepted for verification in self.rounds)


@torch.inference_mode()
def generate_speculative(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompt_ids: Sequence[int],
    config: DecodingConfig,
    stop_ids: Collection[int] = (),
) -> GenerationTrace:
    """Decode with drafted chains until a stop token or `max_new_tokens`."""
    started = time.perf_counter()
    chunks = _speculative_chunks(target, draft, prompt_ids, config)
    tokens = [next(chunks).tokens[0]]
    prefill_seconds = time.perf_counter() - started
    rounds: list[VerificationRound] = []
    while tokens[-1] not in stop_ids and len(tokens) < config.max_new_tokens:
        chunk = next(chunks)
        kept = _until_stop(chunk.tokens, stop_ids)
        accepted = min(chunk.accepted, len(kept))
        ended_early = kept[-1] in stop_ids and len(kept) <= chunk.accepted
        rounds.append(
            VerificationRound(
                verified=accepted if ended_early else config.draft_tokens,
                accepted=accepted,
                gained=len(kept),
            )
        )
        tokens.extend(kept)
    return GenerationTrace(
        tokens=tuple(tokens[: config.max_new_tokens]),
        rounds=tuple(rounds),
        seconds=time.perf_counter() - started,
        prefill_seconds=prefill_seconds,
    )


@torch.inference_mode()
def generate_plain(
    target: CachedTarget[CacheT],
    prompt_ids: Sequence[int],
    config: DecodingConfig,
    stop_ids: Collection[int] = (),
) -> GenerationTrace:
    """Decode one token per target forward, as the target does on its own."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    ids = _as_batch(prompt_ids, target.device)
    past: CacheT | None = None
    tokens: list[int] = []
    prefill_seconds = 0.0
    while not tokens or (tokens[-1] not in stop_ids and len(tokens) < config.max_new_tokens):
        last, _, past = target.forward_cached(ids, past)
        tokens.append(_pick(target.logits(last[0, -1]), config.temperature, generator))
        ids = _as_batch(tokens[-1:], target.device)
        prefill_seconds = prefill_seconds or time.perf_counter() - started
    return GenerationTrace(
        tokens=tuple(tokens),
        seconds=time.perf_counter() - started,
        prefill_seconds=prefill_seconds,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    tokens: tuple[int, ...]
    accepted: int


def _speculative_chunks(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompt_ids: Sequence[int],
    config: DecodingConfig,
) -> Iterator[_Chunk]:
    """Yield the first token, then the tokens of one round after another, without end."""
    generator = torch.Generator().manual_seed(config.seed)
    drafter = ChainDrafter(draft, temperature=config.temperature, generator=generator)
    last, aux, past = target.forward_cached(_as_batch(prompt_ids, target.device), None)
    if hasattr(past, _RECORD_PAST):  # else a full sliding window could not be cropped
        getattr(past, _RECORD_PAST)()
    newest = _pick(target.logits(last[0, -1]), config.temperature, generator)
    drafter.observe([*prompt_ids[1:], newest], aux[0])
    yield _Chunk(tokens=(newest,), accepted=0)
    while True:
        proposal = drafter.propose(config.draft_tokens)
        last, aux, past = target.forward_cached(
            _as_batch([newest, *proposal.tokens], target.device), past
        )
        verdict = _verify(proposal, target.logits(last[0]), config.temperature, generator)
        past.crop(verdict.accepted - config.draft_tokens)
        tokens = (*proposal.tokens[: verdict.accepted], verdict.next_token)
        yield _Chunk(tokens=tokens, accepted=verdict.accepted)
        drafter.observe(tokens, aux[0, : len(tokens)])
        newest = verdict.next_token


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


def _as_batch(ids: Sequence[int], device: torch.device) -> Tensor:
    if not ids:
        raise ConfigError("cannot decode from an empty prompt: give at least one token")
    return torch.tensor([list(ids)], device=device)
