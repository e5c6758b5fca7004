"""The cost of the missing states, and whether they fit. Pure arithmetic."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flows.errors import DoesNotFitError
from flows.reports.units import human_bytes

HEADROOM = 1.02
"""Commit records, snapshots and the file system's blocks add to the size of the shards."""
WITH_RECOMPUTE = " + recompute"


def encoding_name(profile: str, *, recompute: bool) -> str:
    """Return the display name of a profile, with or without recompute."""
    return profile + WITH_RECOMPUTE * recompute


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeCost:
    """The cost of recomputing states during training."""

    weight_bytes: int
    """Of the target's first and last layers, in memory with the draft."""
    load_seconds: float
    tokens_per_second: float
    share_of_capture: float
    """Share of the whole target's time for the same tokens, one sequence at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementCost:
    """Where the target's weights are, and how often they are read."""

    name: str
    reason: str
    pass_tokens: int
    """Tokens that pass through a streamed layer together; 0 if the target is not streamed."""
    num_passes: int
    read_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CostEstimate:
    """What a store holds, what is missing, and what the missing states would cost."""

    store_root: str
    profile: str
    """Named by `encoding_name`, like the keys of `bytes_per_token`."""
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    num_shards: int
    """Missing shards; the two below count missing samples and tokens."""
    missing_samples: int
    missing_tokens: int
    stored_bytes: int
    """Size of the store now."""
    bytes_per_token: Mapping[str, float]
    """By profile, for the missing tokens; empty if there are none."""
    tokens_per_second: float
    """0.0 if it is not known."""
    device: str
    free_bytes: int | None
    """None where free space has no meaning, as on S3."""
    budget_bytes: int | None
    placement: PlacementCost | None = None
    """None if nothing was measured."""
    is_sketch: bool = False
    """Whether the target's weights were not there: sizes and time are rough."""
    counts_too_much: bool = False
    """Whether these weights are quantized, and were counted as if they were not."""
    recompute: RecomputeCost | None = None
    """None if nothing was measured, or the target's layers cannot be run alone."""

    @property
    def seconds(self) -> float:
        """Return the time to compute the missing states; 0.0 if it is not known."""
        is_known = self.missing_tokens and self.tokens_per_second
        return self.missing_tokens / self.tokens_per_second if is_known else 0.0

    def size(self, profile: str) -> int:
        """Return the bytes of the missing states under a profile."""
        return int(self.missing_tokens * self.bytes_per_token.get(profile, 0.0) * HEADROOM)

    def missing_bytes(self, profile: str) -> int:
        """Return by how many bytes the disk or the budget is too small; 0 if everything fits."""
        over = [0]
        if self.free_bytes is not None:
            over.append(self.size(profile) - self.free_bytes)
        if self.budget_bytes is not None:
            over.append(self.stored_bytes + self.size(profile) - self.budget_bytes)
        return max(over) if self.missing_tokens else 0


def require_fits(estimate: CostEstimate) -> None:
    """Raise DoesNotFitError with the missing bytes and remedies, unless everything fits."""
    missing = estimate.missing_bytes(estimate.profile)
    if not missing:
        return
    size = human_bytes(estimate.size(estimate.profile))
    what = f"the {estimate.profile} states of {estimate.missing_tokens:,} tokens take about {size}"
    over_budget = estimate.budget_bytes is not None and (
        estimate.stored_bytes + estimate.size(estimate.profile) - estimate.budget_bytes == missing
    )
    if over_budget:
        assert estimate.budget_bytes is not None  # noqa: S101
        held = (
            f"{human_bytes(estimate.stored_bytes)} are already stored and "
            if estimate.stored_bytes
            else ""
        )
        limit = f"{held}the budget is {human_bytes(estimate.budget_bytes)}"
        first = "raise the budget (store.budget)"
    else:
        assert estimate.free_bytes is not None  # noqa: S101
        limit = f"only {human_bytes(estimate.free_bytes)} are free at {estimate.store_root}"
        first = "free disk space, or move the store (store.root)"
    remedies = "; ".join([first, *_remedies(estimate, missing)])
    raise DoesNotFitError(
        f"{what}, but {limit}: short by {human_bytes(missing)}; nothing was computed. You can: "
        f"{remedies}"
    )


def _remedies(estimate: CostEstimate, missing: int) -> Iterator[str]:
    size = estimate.size(estimate.profile)
    fitting = int(estimate.missing_samples * (size - missing) / size)
    if fitting > 0:
        yield (
            f"use fewer conversations (about {fitting:,} of {estimate.missing_samples:,} fit: "
            "dataset.max_conversations) or shorter ones (dataset.max_length)"
        )
    if estimate.stored_bytes:  # its profile is fixed
        return
    for profile in sorted(estimate.bytes_per_token, key=estimate.size, reverse=True):
        if not estimate.missing_bytes(profile):
            name = profile.removesuffix(WITH_RECOMPUTE)
            also = " and store.recompute=true" if name != profile else ""
            yield f"set store.profile={name}{also} ({human_bytes(estimate.size(profile))})"
