"""What the states still to be made will cost, and whether that fits. Pure arithmetic."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flows.errors import DoesNotFitError
from flows.reports.units import human_bytes

HEADROOM = 1.02
"""Commit records, snapshots and the file system's own blocks come on top of the shards."""


WITH_RECOMPUTE = " + recompute"


def encoding_name(profile: str, *, recompute: bool) -> str:
    """Return what a profile is called here, with or without states that are made again."""
    return profile + WITH_RECOMPUTE * recompute


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeCost:
    """What making states again costs while a draft is trained."""

    weight_bytes: int
    """Of the target's first and last layers, in memory beside the draft."""
    load_seconds: float
    tokens_per_second: float
    share_of_capture: float
    """Of the time that the whole target takes for the same tokens, one sequence at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostEstimate:
    """What a store holds, what it lacks, and what that would take."""

    store_root: str
    profile: str
    """As `encoding_name` calls it, as do the keys of `bytes_per_token`."""
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    num_shards: int
    """Still to be made, as are the two below."""
    samples_to_make: int
    tokens_to_make: int
    stored_bytes: int
    """What lies in the store already."""
    bytes_per_token: Mapping[str, float]
    """By profile, of the tokens to be made; empty if there are none."""
    tokens_per_second: float
    device: str
    free_bytes: int | None
    """None where free space has no meaning, as on S3."""
    budget_bytes: int | None
    recompute: RecomputeCost | None = None
    """None if nothing was measured, or the target's layers cannot be run alone."""

    @property
    def seconds(self) -> float:
        """Return how long making the missing states takes."""
        return self.tokens_to_make / self.tokens_per_second if self.tokens_to_make else 0.0

    def size(self, profile: str) -> int:
        """Return the bytes of the states still to be made under a profile."""
        return int(self.tokens_to_make * self.bytes_per_token.get(profile, 0.0) * HEADROOM)

    def missing_bytes(self, profile: str) -> int:
        """Return by how many bytes the disk or the budget is too small; 0 if all fits."""
        over = [0]
        if self.free_bytes is not None:
            over.append(self.size(profile) - self.free_bytes)
        if self.budget_bytes is not None:
            over.append(self.stored_bytes + self.size(profile) - self.budget_bytes)
        return max(over) if self.tokens_to_make else 0


def require_fits(bill: CostEstimate) -> None:
    """Raise DoesNotFitError, saying how much is missing and what would help, unless all fits."""
    missing = bill.missing_bytes(bill.profile)
    if not missing:
        return
    size = human_bytes(bill.size(bill.profile))
    what = f"the {bill.profile} states of {bill.tokens_to_make:,} tokens take about {size}"
    over_budget = bill.budget_bytes is not None and (
        bill.stored_bytes + bill.size(bill.profile) - bill.budget_bytes == missing
    )
    if over_budget:
        assert bill.budget_bytes is not None  # noqa: S101
        held = f"{human_bytes(bill.stored_bytes)} are there already, " if bill.stored_bytes else ""
        limit = f"{held}the budget is {human_bytes(bill.budget_bytes)}"
        first = "raise the budget (store.budget)"
    else:
        assert bill.free_bytes is not None  # noqa: S101
        limit = f"{human_bytes(bill.free_bytes)} are free at {bill.store_root}"
        first = "free space, or put the store elsewhere (store.root)"
    remedies = "; ".join([first, *_remedies(bill, missing)])
    raise DoesNotFitError(
        f"{what}, {limit}: {human_bytes(missing)} are missing, no shard was made. You can: "
        f"{remedies}"
    )


def _remedies(bill: CostEstimate, missing: int) -> Iterator[str]:
    size = bill.size(bill.profile)
    fitting = int(bill.samples_to_make * (size - missing) / size)
    if fitting > 0:
        yield (
            f"take fewer conversations (about {fitting:,} of {bill.samples_to_make:,} fit: "
            "dataset.max_conversations) or shorter ones (dataset.max_length)"
        )
    if bill.stored_bytes:  # its profile is settled
        return
    for profile in sorted(bill.bytes_per_token, key=bill.size, reverse=True):
        if not bill.missing_bytes(profile):
            name = profile.removesuffix(WITH_RECOMPUTE)
            also = " and store.recompute=true" if name != profile else ""
            yield f"set store.profile={name}{also} ({human_bytes(bill.size(profile))})"
