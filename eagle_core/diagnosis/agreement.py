"""Whether training, real decoding and serving engines count the same acceptance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eagle_core.diagnosis.finding import Finding, not_checked
from eagle_core.evaluation.estimate import AcceptanceEstimate, expected_length

DECODING, ENGINE, OVERFIT = "decoding", "engine", "overfit test"
LENGTH_TO_REACH = 4.5
"""Of 6 with five drafted tokens, on texts that the draft knows by heart."""
LEARNT = 0.9
"""Training accuracy at every depth from which a draft must reach that length."""
_LOST_GAIN = 0.7
_ENGINE_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """A measured acceptance length with its 95 % interval."""

    length: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether there are figures: without any round of decoding all are NaN."""
        return all(map(math.isfinite, (self.length, self.low, self.high)))

    def __str__(self) -> str:
        """Return the figures as tables show them."""
        return f"{self.length:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLength:
    """Acceptance length that a serving engine counted for the prompts of `evaluate`."""

    engine: str
    """Name and version."""
    length: Length
    own: Length
    """Length that `evaluate` counted for the same prompts."""
    is_sampled: bool
    """Whether tokens were sampled: the texts, and hence the rounds, are then others."""
    is_exact: bool
    """Whether both decoded in float32: greedy texts and rounds are then the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OverfitResult:
    """What a fresh draft reached on texts that it was trained on until it knew them."""

    num_texts: int
    num_steps: int
    draft_tokens: int
    training_accuracies: Sequence[float]
    """By training-time-test step, after the last step of training."""
    length: float
    """Tokens per target forward in real decoding of the same texts, 1 to `draft_tokens` + 1."""


def promised_length(estimate: AcceptanceEstimate, *, draft_tokens: int) -> Length | str:
    """Return what an estimate promises for `draft_tokens` (K) per round, or why it cannot.

    For fewer tokens than it drafted, its first K depths count; its interval shrinks as the gain.
    """
    most = len(estimate.acceptance_by_depth)
    if draft_tokens > most:
        return (
            f"evaluate drafted {draft_tokens} tokens per round, and the estimate only {most}: it "
            "says nothing about deeper ones"
        )
    low, high = estimate.acceptance_interval
    if draft_tokens == most:
        return Length(length=estimate.acceptance_length, low=low, high=high)
    by_depth = np.array(estimate.acceptance_by_depth[:draft_tokens])
    length, gain = float(expected_length(by_depth)), estimate.acceptance_length - 1
    scale = (length - 1) / gain if gain > 0 else 1.0
    return Length(length=length, low=1 + scale * (low - 1), high=1 + scale * (high - 1))


def check_decoding(
    decoded: Length | None,
    replayed: Length | str | None,
    *,
    held_out: float | None,
    warning: str = "",
) -> Finding:
    """Return whether real decoding accepts what stored states promise.

    Args:
        decoded: by `evaluate`.
        replayed: by `estimate`, from stored states on held-out text, for as many drafted tokens;
            or why it promises nothing for these.
        held_out: length from joint prefixes, for as many drafted tokens; used where there is no
            estimate.
        warning: why the figures of `evaluate` are not to be relied on.

    """
    if warning:
        return Finding(
            check=DECODING,
            state="problem",
            found=warning,
            expected="greedy speculative texts equal to plain decoding",
            what_to_do="measure with eyas run estimate RECIPE, and report the target",
        )
    if decoded is None:
        return not_checked(DECODING, "there is no evaluation", "eyas run evaluate RECIPE")
    if not decoded.is_known:
        return not_checked(
            DECODING,
            "the evaluation verified no drafted token: its answers end at once",
            "eyas run evaluate RECIPE with other prompts or a larger evaluation.max_new_tokens",
        )
    if isinstance(replayed, str) or (replayed is None and held_out is None):
        return not_checked(
            DECODING,
            replayed or f"real decoding has {decoded}, and there is no estimate",
            "eyas run estimate RECIPE, with the evaluation.draft_tokens of evaluate",
        )
    promised = replayed.low if replayed is not None else held_out or 1.0
    shown = f"stored states {replayed}" if replayed else f"held-out joint prefixes {promised:.2f}"
    found = f"real decoding {decoded}, {shown} tokens per target forward"
    if decoded.high - 1 >= _LOST_GAIN * (promised - 1):
        return Finding(check=DECODING, state="ok", found=found)
    return Finding(
        check=DECODING,
        state="problem",
        found=found,
        expected="about the same: prompts differ, hence not exactly",
        what_to_do="eyas doctor RUN --overfit shows whether training and decoding agree; if they "
        "do, the prompts of evaluate are unlike the held-out text",
    )


def check_engine(engine: EngineLength | str | None) -> Finding:
    """Return whether a serving engine accepts as many tokens as `evaluate`.

    A text says why what an engine counted cannot be read.
    """
    if isinstance(engine, str):
        return not_checked(ENGINE, engine, "run `eyas bench` or that evaluation again")
    if engine is None:
        return not_checked(
            ENGINE,
            "no engine decoded the prompts of evaluate",
            "`eyas run evaluate RECIPE --set evaluation.engine=llamacpp` (or vllm), with the same "
            "evaluation settings as the own decoding",
        )
    found = f"{engine.engine} {engine.length}, own decoding {engine.own}"
    if engine.is_sampled:
        return not_checked(
            ENGINE,
            f"{found}, but both sampled their tokens, so that the texts are others",
            "evaluate greedily with both (evaluation.temperature=0)",
        )
    if not (engine.length.is_known and engine.own.is_known):
        return not_checked(
            ENGINE,
            "an evaluation verified no drafted token",
            "evaluate with both, with other prompts or a larger evaluation.max_new_tokens",
        )
    lowest = engine.own.length - _ENGINE_TOLERANCE if engine.is_exact else engine.own.low
    reached = engine.length.length if engine.is_exact else engine.length.high
    if reached >= lowest:
        return Finding(check=ENGINE, state="ok", found=found)
    return Finding(
        check=ENGINE,
        state="problem",
        found=found,
        expected="the same rounds: greedy decoding in float32"
        if engine.is_exact
        else "95 % intervals that overlap",
        what_to_do="serve the exported folder unchanged, with the same target; then compare aux "
        "layers, norms and RoPE in the engine's log",
    )


def check_overfit(result: OverfitResult | str | None) -> Finding:
    """Return whether a draft that knows its texts by heart has them accepted."""
    if result is None:
        return not_checked(OVERFIT, "it trains for some minutes", "eyas doctor RUN --overfit")
    if isinstance(result, str):
        return not_checked(OVERFIT, result, "use a machine that holds the whole target")
    most = result.draft_tokens + 1
    accuracy = min(result.training_accuracies)
    found = (
        f"{result.length:.2f} of {most} tokens per target forward on {result.num_texts} texts, "
        f"after {result.num_steps} steps; training accuracy {accuracy:.1%} at least"
    )
    if result.length > LENGTH_TO_REACH:
        return Finding(check=OVERFIT, state="ok", found=f"{found}: training and decoding agree")
    has_learnt = accuracy >= LEARNT
    return Finding(
        check=OVERFIT,
        state="problem" if has_learnt else "notice",
        found=found,
        expected=f"more than {LENGTH_TO_REACH}",
        what_to_do="training and decoding disagree about this target: report it with its "
        "config.json"
        if has_learnt
        else "the draft has not learnt the texts, so that decoding proves nothing: compare "
        "training.objective and training.optimizer with the defaults",
    )
