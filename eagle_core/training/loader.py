"""Batches in an order that is a pure function of (seed, epoch), resumable at any sample.

The state between two steps is (source id, seed, epoch, next sample). It is independent of batch
size, ranks and workers: these may change between two runs without losing or repeating a sample.
One thread prepares batches ahead, and the source is asked to prefetch their samples.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eagle_core.samples import SampleSource
from eagle_core.training.packing import PackedBatch, pack

_STEPS_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """Position of a run in its data."""

    source_id: str
    seed: int
    epoch: int = 0
    next_sample: int = 0
    """Index in the epoch's order of the first sample that was not trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStep:
    """The batches of one process for one step, and the state after it."""

    batches: tuple[PackedBatch, ...]
    """At most `batches_per_step`; fewer, even none, if the epoch ends in the middle of a step."""
    num_batches: int
    """Number over all processes."""
    most_batches: int
    """Largest number on one process."""
    after: LoaderState
    """The same on all processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How the batches of a step are formed and distributed over the processes."""

    window: int
    """Groups whose samples are shuffled together."""
    batch_tokens: int
    """Tokens of one packed batch."""
    batches_per_step: int = 1
    """Per process; gradients are accumulated over them."""
    rank: int = 0
    world_size: int = 1


def epoch_order(
    groups: NDArray[np.int64], *, seed: int, epoch: int, window: int
) -> NDArray[np.int64]:
    """Return [N] sample indices: groups shuffled, then samples shuffled inside windows of groups.

    Args:
        groups: [N] non-decreasing group of each sample.
        seed: of the run.
        epoch: from 0.
        window: groups whose samples are mixed; a cache has to hold these.

    """
    rng = np.random.default_rng((seed, epoch))
    borders = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    members = [np.arange(first, end) for first, end in pairwise(borders)]
    shuffled = [members[number] for number in rng.permutation(len(members))]
    windows = [
        rng.permutation(np.concatenate(shuffled[first : first + window]))
        for first in range(0, len(shuffled), window)
    ]
    return np.concatenate(windows)


def batch_end(
    order: NDArray[np.int64], lengths: NDArray[np.int64], *, first: int, batch_tokens: int
) -> int:
    """Return the end of the batch that starts at `first`: the budget, or at least one sample."""
    totals = np.cumsum(lengths[order[first:]])
    return first + max(1, int(np.searchsorted(totals, batch_tokens, side="right")))


def count_steps(
    lengths: NDArray[np.int64],
    groups: NDArray[np.int64],
    shape: StepShape,
    *,
    seed: int,
    epochs: int,
    after: LoaderState | None = None,
) -> int:
    """Return the exact number of steps to the end of `epochs` epochs; batches are rarely full.

    Those before `after` do not count.
    """
    total, first_epoch = 0, after.epoch if after else 0
    for epoch in range(first_epoch, epochs):
        order = epoch_order(groups, seed=seed, epoch=epoch, window=shape.window)
        totals = np.cumsum(lengths[order])
        num_batches, first = 0, after.next_sample if after and epoch == first_epoch else 0
        before = int(totals[first - 1]) if first else 0
        while first < len(order):
            end = int(np.searchsorted(totals, before + shape.batch_tokens, side="right"))
            first = max(first + 1, end)
            before = int(totals[first - 1])
            num_batches += 1
        total += -(-num_batches // (shape.batches_per_step * shape.world_size))
    return total


def steps(source: SampleSource, state: LoaderState, shape: StepShape) -> Iterator[LoadedStep]:
    """Yield steps from `state` on, endlessly; the caller decides when to stop.

    Each step has consecutive batches of the epoch's order, assigned to the ranks in turn. A step
    never crosses the end of an epoch.
    """
    plan = _plan(source, state, shape)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as reader:
        ahead: deque[Future[LoadedStep]] = deque()
        try:
            while True:
                while len(ahead) <= _STEPS_AHEAD:
                    members, after = next(plan)
                    mine = members[shape.rank :: shape.world_size]
                    source.prefetch(index for batch in mine for index in batch.tolist())
                    ahead.append(reader.submit(_load, source, mine, len(members), shape, after))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


Members = list[NDArray[np.int64]]


def _plan(
    source: SampleSource, state: LoaderState, shape: StepShape
) -> Iterator[tuple[Members, LoaderState]]:
    """Yield per step the samples of each batch, for all ranks, and the state after the step."""
    lengths, groups = source.lengths, source.groups
    epoch, first = state.epoch, state.next_sample
    while True:
        order = epoch_order(groups, seed=state.seed, epoch=epoch, window=shape.window)
        while first < len(order):
            members: Members = []
            while first < len(order) and len(members) < shape.batches_per_step * shape.world_size:
                end = batch_end(order, lengths, first=first, batch_tokens=shape.batch_tokens)
                members.append(order[first:end])
                first = end
            ended = first == len(order)
            yield (
                members,
                LoaderState(
                    source_id=state.source_id,
                    seed=state.seed,
                    epoch=epoch + ended,
                    next_sample=0 if ended else first,
                ),
            )
        epoch, first = epoch + 1, 0


def _load(
    source: SampleSource, mine: Members, num_batches: int, shape: StepShape, after: LoaderState
) -> LoadedStep:
    packed = (pack([source.fetch(int(index)) for index in indices]) for indices in mine)
    return LoadedStep(
        batches=tuple(packed),
        num_batches=num_batches,
        most_batches=-(-num_batches // shape.world_size),
        after=after,
    )
