"""A text as a server sent it, round by round, and what of it counts.

Texts are cut where Eyas's own decoding ends: at a stop token, or with the round that reaches
`max_new_tokens`, which counts in full. So servers are asked for K tokens more than are kept.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.trace import GenerationTrace, VerificationRound, kept_round, until_stop


@dataclass(frozen=True, kw_only=True, slots=True)
class SentRound:
    """The tokens of one verifying forward."""

    tokens: tuple[int, ...]
    """Those accepted and the target's own; tokens after a stop token may be missing."""
    accepted: int
    """Drafted tokens that were accepted, those after a stop token included."""
    drafted: int
    seconds: float
    """When they had arrived, since the request."""


def to_trace(
    first: Sequence[int],
    rounds: Sequence[SentRound],
    config: DecodingConfig,
    stop_ids: Collection[int],
    *,
    first_seconds: float,
) -> GenerationTrace:
    """Return the trace of a text whose prefill gave `first`, usually one token."""
    tokens = list(until_stop(first, stop_ids))
    seconds = first_seconds
    kept_rounds: list[VerificationRound] = []
    for sent in rounds:
        if len(tokens) >= config.max_new_tokens or tokens[-1] in stop_ids:
            break
        kept, verification = kept_round(
            sent.tokens, accepted=sent.accepted, drafted=sent.drafted, stop_ids=stop_ids
        )
        tokens.extend(kept)
        kept_rounds.append(verification)
        seconds = sent.seconds
    return GenerationTrace(
        tokens=tuple(tokens[: config.max_new_tokens]),
        rounds=tuple(kept_rounds),
        seconds=seconds,
        prefill_seconds=first_seconds,
    )


def tokens_to_ask(config: DecodingConfig, *, draft_tokens: int) -> int:
    """Return how many tokens a server must write, so that the last round is whole."""
    return config.max_new_tokens + draft_tokens
