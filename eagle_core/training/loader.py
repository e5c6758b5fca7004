"""Batches in an order that is a pure function of (seed, epoch), resumable at any sample.

The state between two steps is (source id, seed, epoch, next sample, next token). It is independent
of batch size, windows, ranks and workers: these may change between two runs without losing or
repeating a position.
One thread prepares batches ahead, and the source is asked to prefetch their samples. For a CUDA
device they are also copied, one step ahead.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eagle_core.errors import ConfigError
from eagle_core.samples import SampleSource
from eagle_core.training.device_copies import Batches, DeviceCopies
from eagle_core.training.packing import PackedBatch
from eagle_core.training.pieces import WHOLE, PieceReader, Pieces, Weights, Windows
from eagle_core.training.position_draws import PositionDraws

_STEPS_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """Position of a run in its data."""

    source_id: str
    seed: int
    epoch: int = 0
    next_sample: int = 0
    """Index in the epoch's order of the first sample that was not trained on to its end."""
    next_token: int = 0
    """Its first position that was not trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStep:
    """The batches of one process for one step, and the state after it."""

    batches: tuple[PackedBatch, ...]
    """At most `batches_per_step`; fewer, even none, if the epoch ends in the middle of a step."""
    num_batches: int
    """Number over all processes."""
    most_batches: int
    """Largest number on one process."""
    num_supervised: int
    """Supervised tokens of this process, without context."""
    after: LoaderState
    """The same on all processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How the batches of a step are formed and distributed over the processes."""

    window: int
    """Groups whose samples are shuffled together."""
    batch_tokens: int
    """Most tokens of one packed batch, unless a piece of a sample has more."""
    windows: Windows = WHOLE
    """How long samples are divided."""
    batches_per_step: int = 1
    """Per process; gradients are accumulated over them."""
    rank: int = 0
    world_size: int = 1
    draws: PositionDraws | None = None
    """Which positions are taken; None: all."""

    @property
    def batches_of_all(self) -> int:
        """Return the number of batches of a step, over all processes."""
        return self.batches_per_step * self.world_size


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
    starts = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    shuffled = rng.permutation(len(starts) - 1)
    sizes = np.diff(starts)[shuffled]
    ends = np.cumsum(sizes)
    order = np.repeat(starts[shuffled] - (ends - sizes), sizes) + np.arange(len(groups))
    for number in range(0, len(ends), window):
        first = ends[number] - sizes[number]
        rng.shuffle(order[first : ends[min(number + window, len(ends)) - 1]])
    return order


def batch_borders(lengths: NDArray[np.int64], batch_tokens: int) -> NDArray[np.int64]:
    """Return [B + 1] the first piece of each batch, then N: the budget, or at least one piece.

    One pass over all pieces, so that an epoch is divided once and not batch by batch. A batch
    depends only on where it starts: batches of the rest of an epoch are those of the whole.

    Args:
        lengths: [N] tokens of the pieces of samples, in the epoch's order.
        batch_tokens: most tokens of a batch.

    """
    totals = np.concatenate([[0], np.cumsum(lengths)])
    fitting = np.searchsorted(totals, totals[:-1] + batch_tokens, side="right") - 1
    ends = np.maximum(fitting, np.arange(1, len(totals))).tolist()
    borders = [0]
    while borders[-1] < len(lengths):
        borders.append(ends[borders[-1]])
    return np.array(borders)


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
    state = after or LoaderState(source_id="", seed=seed)
    total = 0
    while state.epoch < epochs:
        order = epoch_order(groups, seed=seed, epoch=state.epoch, window=shape.window)
        pieces = _pieces_left(lengths, order, state, shape)
        num_batches = len(batch_borders(pieces.sizes, shape.batch_tokens)) - 1
        total += -(-num_batches // shape.batches_of_all)
        state = _next_epoch(state)
    return total


def _pieces_left(
    lengths: NDArray[np.int64], order: NDArray[np.int64], state: LoaderState, shape: StepShape
) -> Pieces:
    """Return the pieces of an epoch that follow `state`; samples count from its next one."""
    return shape.windows.pieces(lengths[order[state.next_sample :]], state.next_token)


def _next_epoch(state: LoaderState) -> LoaderState:
    return replace(state, epoch=state.epoch + 1, next_sample=0, next_token=0)


def windows_in_use(shape: StepShape, *, tokens: int, num_groups: int) -> int:
    """Return how many windows the prepared steps of all ranks touch at most.

    Args:
        shape: of the steps.
        tokens: of all samples.
        num_groups: of all samples.

    """
    window_tokens = shape.window * tokens / num_groups
    prepared = (_STEPS_AHEAD + 2) * shape.batches_of_all * shape.batch_tokens
    return 1 + math.ceil(prepared / window_tokens)


def _unchanged(batch: PackedBatch) -> PackedBatch:
    return batch


def steps(
    source: SampleSource,
    state: LoaderState,
    shape: StepShape,
    copies: DeviceCopies | None = None,
    prepare: Callable[[PackedBatch], PackedBatch] = _unchanged,
) -> Iterator[LoadedStep]:
    """Yield steps from `state` on, endlessly; the caller decides when to stop.

    Each step has consecutive batches of the epoch's order, assigned to the ranks in turn. A step
    never crosses the end of an epoch. With `copies`, the batches of a step are pinned, and copied
    while the caller works on the step before; without, they are on the CPU. The thread that loads
    them lets `prepare` work on each.
    """
    with closing(_loading(source, state, shape, copies, prepare)) as loading:
        if copies is None:
            for step in loading:
                yield step.result()
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies") as copier:
            following = copier.submit(_begin_copy, next(loading), copies)
            while True:
                loaded, finish = following.result()
                following = copier.submit(_begin_copy, next(loading), copies)
                yield replace(loaded, batches=finish())


def _begin_copy(
    step: Future[LoadedStep], copies: DeviceCopies
) -> tuple[LoadedStep, Callable[[], Batches]]:
    loaded = step.result()
    return loaded, copies.begin(loaded.batches)


def _loading(
    source: SampleSource,
    state: LoaderState,
    shape: StepShape,
    copies: DeviceCopies | None,
    prepare: Callable[[PackedBatch], PackedBatch],
) -> Generator[Future[LoadedStep]]:
    """Yield the steps from `state` on, which one thread loads ahead."""
    plan, pieces = _plan(source, state, shape), PieceReader(source)
    most_ahead = _STEPS_AHEAD if copies is None else _STEPS_AHEAD - 1  # one is being copied
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as reader:
        ahead: deque[Future[LoadedStep]] = deque()
        try:
            while True:
                while len(ahead) <= most_ahead:
                    members, epoch, after = next(plan)
                    source.prefetch(
                        _of_ranks(members, shape, 0, 1),
                        _of_ranks(members, shape, 1, shape.world_size),
                    )
                    weights_of = None
                    if shape.draws is not None:
                        weights_of = partial(shape.draws.weights, seed=state.seed, epoch=epoch)
                    ahead.append(
                        reader.submit(
                            _load,
                            pieces,
                            members,
                            shape,
                            after,
                            weights_of,
                            pin_memory=copies is not None,
                            prepare=prepare,
                        )
                    )
                yield ahead.popleft()
        finally:
            for future in ahead:
                future.cancel()


Members = list[Pieces]


def _plan(
    source: SampleSource, state: LoaderState, shape: StepShape
) -> Iterator[tuple[Members, int, LoaderState]]:
    """Yield per step the pieces of each batch, for all ranks, its epoch, and the state after it."""
    if not len(source.lengths):
        raise ConfigError("there is no sample to train on: the snapshot is empty")
    while True:
        order = epoch_order(source.groups, seed=state.seed, epoch=state.epoch, window=shape.window)
        first = state.next_sample
        left = _pieces_left(source.lengths, order, state, shape)
        pieces = left.of(order[first:])
        borders = batch_borders(left.sizes, shape.batch_tokens)
        following = _next_epoch(state)
        for number in range(0, len(borders) - 1, shape.batches_of_all):
            of_step = borders[number : number + shape.batches_of_all + 1].tolist()
            after = following
            if of_step[-1] < len(left):
                after = replace(
                    state,
                    next_sample=first + int(left.sample[of_step[-1]]),
                    next_token=int(left.own_start[of_step[-1]]),
                )
            yield [pieces[begin:end] for begin, end in pairwise(of_step)], state.epoch, after
        state = following


def _of_ranks(members: Members, shape: StepShape, first: int, end: int) -> Iterator[int]:
    """Yield the samples of the ranks from `first` on, counted from this one."""
    for rank in range(shape.rank + first, shape.rank + end):
        for batch in members[rank % shape.world_size :: shape.world_size]:
            yield from dict.fromkeys(batch.sample.tolist())


def _load(
    reader: PieceReader,
    members: Members,
    shape: StepShape,
    after: LoaderState,
    weights_of: Weights | None,
    *,
    pin_memory: bool,
    prepare: Callable[[PackedBatch], PackedBatch],
) -> LoadedStep:
    batches = tuple(
        prepare(reader.read(pieces, weights_of, pin_memory=pin_memory))
        for pieces in members[shape.rank :: shape.world_size]
    )
    return LoadedStep(
        batches=batches,
        num_batches=len(members),
        most_batches=-(-len(members) // shape.world_size),
        num_supervised=sum(int((batch.loss_mask & batch.is_own()).sum()) for batch in batches),
        after=after,
    )
