"""The order of an epoch, and batches that resume anywhere."""

import itertools
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample
from eagle_core.training.device_copies import Batches, device_copies
from eagle_core.training.loader import (
    LoaderState,
    StepShape,
    batch_borders,
    count_steps,
    epoch_order,
    steps,
)
from tests.eagle_core.random_source import RandomSource
from tests.waiting import wait_for


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
    window=st.integers(1, 5),
)
def test_an_epoch_holds_every_sample_once_and_mixes_only_inside_windows(
    sizes: list[int], seed: int, epoch: int, window: int
) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(groups, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(len(groups)))
    assert np.array_equal(order, epoch_order(groups, seed=seed, epoch=epoch, window=window))
    seen = list(dict.fromkeys(groups[order].tolist()))
    for first in range(0, len(seen), window):
        members = set(seen[first : first + window])
        places = [place for place, index in enumerate(order) if groups[index] in members]
        assert places == list(range(min(places), max(places) + 1))


def test_another_epoch_or_seed_is_another_order() -> None:
    groups = np.repeat(np.arange(10), 5)
    orders = [
        tuple(epoch_order(groups, seed=seed, epoch=epoch, window=4))
        for seed, epoch in itertools.product((0, 1), (0, 1))
    ]
    assert len(set(orders)) == 4


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), budget=st.integers(1, 120))
def test_a_batch_fits_the_budget_or_is_one_sample(lengths: list[int], budget: int) -> None:
    array = np.array(lengths)
    borders = batch_borders(array, budget).tolist()
    assert borders[0] == 0
    assert borders[-1] == len(lengths)
    for first, end in itertools.pairwise(borders):
        assert end > first
        assert end == first + 1 or array[first:end].sum() <= budget
        if end < len(lengths):
            assert array[first : end + 1].sum() > budget


def plain_order(groups: np.ndarray, *, seed: int, epoch: int, window: int) -> np.ndarray:
    """Return the order as the first version computed it: runs that began with it go on."""
    rng = np.random.default_rng((seed, epoch))
    borders = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    members = [np.arange(first, end) for first, end in itertools.pairwise(borders)]
    shuffled = [members[number] for number in rng.permutation(len(members))]
    return np.concatenate(
        [
            rng.permutation(np.concatenate(shuffled[first : first + window]))
            for first in range(0, len(shuffled), window)
        ]
    )


def plain_batch_end(order: np.ndarray, lengths: np.ndarray, first: int, batch_tokens: int) -> int:
    """Return the end of one batch as the first version computed it, from all samples after it."""
    totals = np.cumsum(lengths[order[first:]])
    return first + max(1, int(np.searchsorted(totals, batch_tokens, side="right")))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    window=st.integers(1, 14),
    budget=st.integers(1, 120),
    data=st.data(),
)
def test_order_and_batches_are_those_of_the_first_version(
    sizes: list[int], seed: int, window: int, budget: int, data: st.DataObject
) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.random.default_rng(seed).integers(1, 60, len(groups))
    order = epoch_order(groups, seed=seed, epoch=3, window=window)
    assert order.tolist() == plain_order(groups, seed=seed, epoch=3, window=window).tolist()
    resumed_at = data.draw(st.integers(0, len(order) - 1))
    expected = [resumed_at]
    while expected[-1] < len(order):
        expected.append(plain_batch_end(order, lengths, expected[-1], budget))
    found = resumed_at + batch_borders(lengths[order[resumed_at:]], budget)
    assert found.tolist() == expected


@settings(deadline=None, max_examples=20)
@given(stop=st.integers(1, 12), other_budget=st.integers(20, 90))
def test_resuming_loses_and_repeats_nothing_even_with_another_batch_size(
    stop: int, other_budget: int
) -> None:
    source = RandomSource()
    start = LoaderState(source_id=source.source_id, seed=7)
    whole = _ids(source, start, 60, budget=40)
    first, after = _until(source, start, stop, budget=40)
    rest = _ids(source, after, 60, budget=other_budget)
    assert (first + rest)[:60] == whole[:60]


@settings(deadline=None, max_examples=20)
@given(
    budget=st.integers(5, 90),
    epochs=st.integers(1, 3),
    ranks=st.integers(1, 3),
    batches=st.integers(1, 3),
)
def test_steps_are_counted_before_they_are_made(
    budget: int, epochs: int, ranks: int, batches: int
) -> None:
    source = RandomSource()
    shape = StepShape(window=2, batch_tokens=budget, batches_per_step=batches, world_size=ranks)
    counted = count_steps(source.lengths, source.groups, shape, seed=7, epochs=epochs)
    state = LoaderState(source_id=source.source_id, seed=7)
    made = itertools.takewhile(
        lambda state: state.epoch < epochs, (loaded.after for loaded in steps(source, state, shape))
    )
    assert sum(1 for _ in made) + 1 == counted


def _until(
    source: RandomSource, state: LoaderState, num_steps: int, *, budget: int
) -> tuple[list[str], LoaderState]:
    ids: list[str] = []
    stream = steps(source, state, StepShape(window=2, batch_tokens=budget))
    for loaded in itertools.islice(stream, num_steps):
        ids += [name for batch in loaded.batches for name in batch.sample_ids]
        state = loaded.after
    return ids, state


def _ids(source: RandomSource, state: LoaderState, count: int, *, budget: int) -> list[str]:
    ids: list[str] = []
    for loaded in steps(source, state, StepShape(window=2, batch_tokens=budget)):
        ids += [name for batch in loaded.batches for name in batch.sample_ids]
        if len(ids) >= count:
            break
    return ids


@settings(deadline=None, max_examples=20)
@given(first_ranks=st.integers(1, 4), then_ranks=st.integers(1, 4), stop=st.integers(0, 6))
def test_ranks_may_change_without_a_sample_lost_or_repeated(
    first_ranks: int, then_ranks: int, stop: int
) -> None:
    source = RandomSource()
    state = LoaderState(source_id=source.source_id, seed=3)
    seen: list[str] = []
    for ranks, num_steps in ((first_ranks, stop), (then_ranks, 10**6)):
        streams = [
            steps(source, state, StepShape(window=2, batch_tokens=40, rank=rank, world_size=ranks))
            for rank in range(ranks)
        ]
        for _ in range(num_steps):
            if state.epoch == 1:
                break
            loaded = [next(stream) for stream in streams]
            assert len({(step.after, step.num_batches) for step in loaded}) == 1
            assert sum(len(step.batches) for step in loaded) == loaded[0].num_batches
            seen += [n for step in loaded for batch in step.batches for n in batch.sample_ids]
            state = loaded[0].after
        for stream in streams:
            stream.close()
    assert sorted(seen) == sorted(source.fetch(i).sample_id for i in range(len(source.lengths)))


def test_a_rank_tells_its_own_samples_from_those_of_others() -> None:
    """Without shared memory, only its own are worth reading ahead."""

    @dataclass
    class AskedSource(RandomSource):
        asked: list[tuple[list[int], list[int]]] = field(default_factory=list)
        fetched: list[int] = field(default_factory=list)

        def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
            self.asked.append((list(indices), list(others)))

        def fetch(self, index: int) -> HiddenStateSample:
            self.fetched.append(index)
            return super().fetch(index)

    sources = [AskedSource() for _ in range(3)]
    for rank, source in enumerate(sources):
        shape = StepShape(window=2, batch_tokens=20, rank=rank, world_size=3)
        next(steps(source, LoaderState(source_id="random", seed=7), shape))
        own, others = source.asked[0]
        assert own == source.fetched[: len(own)]
        assert own
    assert others == [index for one in sources[:2] for index in one.asked[0][0]]


def test_a_source_without_samples_is_refused() -> None:
    source = RandomSource(num_samples=0)
    state = LoaderState(source_id=source.source_id, seed=3)
    with pytest.raises(ConfigError, match="no sample to train on"):
        next(steps(source, state, StepShape(window=2, batch_tokens=40)))


class RecordedCopies:
    """Stands where a device would copy, and records what is asked of it, and in which thread."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, ...]] = []
        self.finished: list[tuple[str, ...]] = []
        self.threads: list[set[str]] = [set(), set()]

    def begin(self, batches: Batches) -> Callable[[], Batches]:
        names = tuple(name for batch in batches for name in batch.sample_ids)
        self.begun.append(names)
        self.threads[0].add(threading.current_thread().name)

        def finish() -> Batches:
            self.finished.append(names)
            self.threads[1].add(threading.current_thread().name)
            return batches

        return finish


def test_the_next_step_is_copied_while_the_caller_works_on_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty
    pinned: list[bool] = []

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        pinned.append(pin_memory)  # a machine without a GPU cannot pin
        return empty(*args, **kwargs)

    monkeypatch.setattr("eagle_core.training.packing.torch.empty", unpinned)
    source, copies = RandomSource(), RecordedCopies()
    state, shape = LoaderState(source_id="random", seed=7), StepShape(window=2, batch_tokens=40)
    plain = list(itertools.islice(steps(source, state, shape), 6))
    assert not any(pinned)
    pinned.clear()
    with closing(steps(source, state, shape, copies)) as stream:  # type: ignore[type-var]
        for number, expected in enumerate(plain):
            loaded = next(stream)
            assert loaded.after == expected.after
            assert loaded.num_supervised == expected.num_supervised
            (batch,), (same,) = loaded.batches, expected.batches
            for name, tensor in same.tensors().items():
                assert torch.equal(batch.tensors()[name], tensor)
            wait_for(
                lambda number=number: len(copies.begun) == number + 2,  # type: ignore[misc]
                what="the copy of the next step",
                every_seconds=0.001,
            )
            assert len(copies.finished) == number + 1
    assert copies.begun[:6] == copies.finished == [step.batches[0].sample_ids for step in plain]
    assert copies.threads[0].isdisjoint(copies.threads[1])
    assert copies.threads[1] == {threading.current_thread().name}
    assert pinned
    assert all(pinned)


def test_an_error_of_the_source_reaches_the_caller_of_a_copied_step() -> None:
    class FailingSource(RandomSource):
        def fetch(self, index: int) -> HiddenStateSample:
            raise ConfigError(f"sample {index} cannot be read")

    state, shape = LoaderState(source_id="random", seed=7), StepShape(window=2, batch_tokens=40)
    for copies in (None, RecordedCopies()):
        with pytest.raises(ConfigError, match="cannot be read"):
            next(steps(FailingSource(), state, shape, copies))


def test_a_cpu_needs_no_copies() -> None:
    assert device_copies(torch.device("cpu")) is None
