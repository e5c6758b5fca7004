"""What an engine makes of a draft: its speed by draft length and concurrency, in one run."""

from dataclasses import dataclass

from eagle_core.evaluation.acceptance import AcceptanceReport


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpeed:
    """The same prompts, decoded with a draft and without, so many at a time."""

    draft_tokens: int
    """K, tokens drafted per round."""
    concurrency: int
    """Prompts decoded at a time."""
    tokens_per_second: float
    """Of all prompts together, prefill included."""
    plain_tokens_per_second: float
    num_matching: int | None
    """Texts equal to the engine's own plain decoding; None if tokens were sampled."""

    @property
    def speedup(self) -> float:
        """Speculative over plain tokens per second."""
        return self.tokens_per_second / self.plain_tokens_per_second


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """What an engine made of a draft."""

    engine: str
    """Name and version."""
    dtype: str
    by_draft_tokens: dict[int, AcceptanceReport]
    """By K, one prompt at a time."""
    speeds: tuple[EngineSpeed, ...]
    """By K and concurrency, ascending."""
