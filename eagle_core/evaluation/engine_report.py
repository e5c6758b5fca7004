"""What an engine makes of a draft: its speed by draft setting and concurrency, in one run.

A round costs so many plain forwards, whatever it accepts. So the measured ratio of the speeds gives
the acceptance length at which both are equal: from there on the draft pays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from eagle_core.evaluation.acceptance import AcceptanceReport, FloatOrNan

_LEAST_PAYS_FROM = 0.9
"""A round contains a forward of the target, so it costs one plain forward or more, up to noise."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class DraftSetting:
    """How much an engine drafts per round."""

    draft_tokens: int
    """K, the most tokens."""
    p_min: float = 0.0
    """Probability of a token below which llama.cpp stops drafting; 0 always drafts K tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingAcceptance:
    """Acceptance with one setting, one prompt at a time."""

    setting: DraftSetting
    report: AcceptanceReport


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpeed:
    """The same prompts, decoded with a draft and without, so many at a time."""

    setting: DraftSetting
    concurrency: int
    """Prompts decoded at a time."""
    tokens_per_second: float
    """Of all prompts together, prefill included."""
    plain_tokens_per_second: float
    num_matching: int | None
    """Texts equal to the engine's own plain decoding; None if tokens were sampled."""
    acceptance_length: FloatOrNan
    """Of the same setting, one prompt at a time: what a round accepts depends on its own text."""
    prefill_share: float
    """Part of the texts' time with the draft before their first token, which no draft shortens."""

    @property
    def speedup(self) -> float:
        """Speculative over plain tokens per second."""
        return self.tokens_per_second / self.plain_tokens_per_second

    @property
    def pays_from(self) -> float:
        """The acceptance length from which this setting is as fast as plain decoding."""
        return break_even_length(
            self.acceptance_length, speedup=self.speedup, prefill_share=self.prefill_share
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """What an engine made of a draft."""

    engine: str
    """Name and version."""
    dtype: str
    acceptances: tuple[SettingAcceptance, ...]
    """By setting, ascending."""
    speeds: tuple[EngineSpeed, ...]
    """By setting and concurrency, ascending."""

    def acceptance(self, setting: DraftSetting) -> AcceptanceReport:
        """Return the acceptance of a setting that was measured."""
        return next(one.report for one in self.acceptances if one.setting == setting)

    @property
    def num_impossible(self) -> int:
        """Speeds by which a round would be cheaper than a plain forward: the machine was busy."""
        return sum(speed.pays_from < _LEAST_PAYS_FROM for speed in self.speeds)

    def best(self) -> Mapping[int, EngineSpeed]:
        """Return the fastest setting at each concurrency, ascending; it may be slower than plain.

        Of settings that are equally fast, the one that drafts least.
        """
        found: dict[int, EngineSpeed] = {}
        for speed in self.speeds:
            before = found.get(speed.concurrency)
            if before is None or speed.tokens_per_second > before.tokens_per_second:
                found[speed.concurrency] = speed
        return dict(sorted(found.items()))


def break_even_length(length: float, *, speedup: float, prefill_share: float = 0.0) -> float:
    """Return the acceptance length at which decoding with a draft is as fast as without.

    With T seconds for texts with the draft, of which P are prefill, rounds take T - P at an
    acceptance `length`, and (T - P) * length / x at x. Plain decoding takes T * `speedup`. Infinite
    if that is no longer than the prefill with the draft.
    """
    room = speedup - prefill_share
    if math.isnan(length):
        return math.nan
    return length * (1 - prefill_share) / room if room > 0 else math.inf
