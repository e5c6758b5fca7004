"""Batches in an order that is a pure function of (seed, epoch), resumable at any sample.

The state between two batches is (source id, seed, epoch, next sample): it knows nothing of batch
size, ranks or workers. Batches are made ahead by one thread, and the source told what comes.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eagle_core.packing import PackedBatch, pack
from eagle_core.samples import SampleSource

_BATCHES_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """Where in the data a run is."""

    source_id: str
    seed: int
    epoch: int = 0
    next_sample: int = 0
    """Place in the epoch's order of the first sample that was not trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBatch:
    """A batch, and the state after it."""

    batch: PackedBatch
    after: LoaderState


def epoch_order(
    groups: NDArray[np.int64], *, seed: int, epoch: int, window: int
) -> NDArray[np.int64]:
    """Return [N] sample indices: groups shuffled, then samples shuffled inside windows of groups.

    Args:
        groups: [N] non-decreasing group of each sample.
        seed: of the run.
        epoch: from 0.
        window: groups whose samples are mixed; what a cache has to hold.

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
    """Return the end of the batch from `first` on: at least one sample, then to the budget."""
    totals = np.cumsum(lengths[order[first:]])
    return first + max(1, int(np.searchsorted(totals, batch_tokens, side="right")))


def batches(
    source: SampleSource, state: LoaderState, *, window: int, batch_tokens: int
) -> Iterator[LoadedBatch]:
    """Yield batches from `state` on, without end; the caller decides when to stop."""
    plan = _plan(source, state, window=window, batch_tokens=batch_tokens)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as reader:
        ahead: deque[Future[LoadedBatch]] = deque()
        try:
            while True:
                while len(ahead) <= _BATCHES_AHEAD:
                    indices, after = next(plan)
                    source.prefetch(indices.tolist())
                    ahead.append(reader.submit(_load, source, indices, after))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _plan(
    source: SampleSource, state: LoaderState, *, window: int, batch_tokens: int
) -> Iterator[tuple[NDArray[np.int64], LoaderState]]:
    lengths, groups = source.lengths, source.groups
    epoch, first = state.epoch, state.next_sample
    while True:
        order = epoch_order(groups, seed=state.seed, epoch=epoch, window=window)
        while first < len(order):
            end = batch_end(order, lengths, first=first, batch_tokens=batch_tokens)
            indices, first = order[first:end], end
            ended = first == len(order)
            yield (
                indices,
                LoaderState(
                    source_id=state.source_id,
                    seed=state.seed,
                    epoch=epoch + ended,
                    next_sample=0 if ended else first,
                ),
            )
        epoch, first = epoch + 1, 0


def _load(source: SampleSource, indices: NDArray[np.int64], after: LoaderState) -> LoadedBatch:
    return LoadedBatch(batch=pack([source.fetch(int(index)) for index in indices]), after=after)
