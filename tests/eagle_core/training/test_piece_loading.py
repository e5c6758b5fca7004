"""Epochs of long samples: no position is lost or repeated, and no batch is too large."""

import dataclasses
import itertools
from collections.abc import Iterable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from eagle_core.samples import HiddenStateSample
from eagle_core.training.loader import (
    LoadedStep,
    LoaderState,
    StepShape,
    count_steps,
    epoch_order,
    steps,
)
from eagle_core.training.pieces import WHOLE, Windows
from eagle_core.training.position_draws import PositionDraws
from tests.eagle_core.long_source import long_source
from tests.eagle_core.random_source import RandomSource

LENGTHS = [9, 70, 3, 30, 31, 12, 150, 5, 8, 44, 29, 6]
WINDOWS = Windows(tokens=30, before=7, after=4)
Position = tuple[int, int]
"""A sample and a position of it."""


class NumberedSource(RandomSource):
    """A source whose token ids say the sample, and the position in it."""

    fetched: list[int]
    asked: list[list[int]]

    def fetch(self, index: int) -> HiddenStateSample:
        self.fetched.append(index)
        sample = super().fetch(index)
        ids = 1000 * index + np.arange(len(sample), dtype=np.int32)
        return dataclasses.replace(sample, input_ids=ids)

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:  # noqa: ARG002
        self.asked.append(list(indices))


def numbered_source() -> NumberedSource:
    plain = long_source(LENGTHS)
    source = NumberedSource(num_samples=len(LENGTHS))
    source.lengths, source.groups = plain.lengths, plain.groups
    source.fetched, source.asked = [], []
    return source


def positions_of(loaded: LoadedStep) -> list[list[Position]]:
    """Return the own positions of each batch."""
    found = []
    for batch in loaded.batches:
        ids = batch.input_ids[batch.is_own()].tolist()
        found.append([(one // 1000, one % 1000) for one in ids])
    return found


def expected_positions(*, epoch: int) -> list[Position]:
    """Return all positions, in the order of an epoch of seed 7."""
    order = epoch_order(numbered_source().groups, seed=7, epoch=epoch, window=2)
    return [(index, at) for index in order.tolist() for at in range(LENGTHS[index])]


windows_of_runs = st.one_of(
    st.just(WHOLE),
    st.builds(
        lambda before, after, stride: Windows(
            tokens=before + after + stride, before=before, after=after
        ),
        st.integers(0, 12),
        st.integers(0, 8),
        st.integers(1, 40),
    ),
)
attempts = st.lists(
    st.tuples(windows_of_runs, st.integers(5, 90), st.integers(1, 3), st.integers(0, 6)),
    max_size=4,
)


@settings(deadline=None, max_examples=50)
@given(attempts=attempts, last=st.tuples(windows_of_runs, st.integers(5, 90), st.integers(1, 3)))
def test_windows_batches_and_ranks_may_change_in_the_middle_of_a_sample(
    attempts: list[tuple[Windows, int, int, int]], last: tuple[Windows, int, int]
) -> None:
    source = numbered_source()
    state = LoaderState(source_id=source.source_id, seed=7)
    seen: list[Position] = []
    for windows, budget, ranks, num_steps in [*attempts, (*last, 10**6)]:
        shape = StepShape(window=2, batch_tokens=budget, windows=windows, world_size=ranks)
        left = count_steps(source.lengths, source.groups, shape, seed=7, epochs=2, after=state)
        streams = [
            steps(source, state, dataclasses.replace(shape, rank=rank)) for rank in range(ranks)
        ]
        num_made = 0
        while num_made < num_steps and state.epoch < 2:
            loaded = [next(stream) for stream in streams]
            assert len({(step.after, step.num_batches) for step in loaded}) == 1
            by_rank = [positions_of(step) for step in loaded]
            for batch in itertools.chain.from_iterable(itertools.zip_longest(*by_rank)):
                seen += batch or []
            for batch in itertools.chain.from_iterable(step.batches for step in loaded):
                is_one_piece = len(batch.sample_ids) == 1
                assert batch.num_tokens <= (windows.tokens if is_one_piece else budget)
            state = loaded[0].after
            num_made += 1
        assert num_made == min(left, num_steps)
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]  # a generator
    assert state == LoaderState(source_id="random", seed=7, epoch=2)
    assert seen == expected_positions(epoch=0) + expected_positions(epoch=1)


@pytest.mark.parametrize("budget", [30, 37, 64])
def test_no_batch_is_larger_than_the_budget_if_no_window_is(budget: int) -> None:
    shape = StepShape(window=2, batch_tokens=budget, windows=WINDOWS)
    state = LoaderState(source_id="random", seed=7)
    stream = steps(numbered_source(), state, shape)
    sizes = [
        batch.num_tokens for loaded in itertools.islice(stream, 40) for batch in loaded.batches
    ]
    assert max(sizes) <= budget
    assert max(sizes) > budget - 15


def test_a_sample_is_fetched_once_though_its_pieces_are_in_several_steps() -> None:
    source = numbered_source()
    shape = StepShape(window=2, batch_tokens=30, windows=WINDOWS)
    state, num_steps = LoaderState(source_id="random", seed=7), 0
    for loaded in steps(source, state, shape):
        num_steps += 1
        if loaded.after.epoch == 1:
            break
    order = epoch_order(source.groups, seed=7, epoch=0, window=2).tolist()
    assert num_steps > len(LENGTHS)
    assert source.fetched[: len(order)] == order
    asked = list(dict.fromkeys(itertools.chain.from_iterable(source.asked[:num_steps])))
    assert asked == order


def test_each_rank_fetches_the_sample_whose_pieces_it_has() -> None:
    sources = [numbered_source() for _ in range(2)]
    shape = StepShape(window=2, batch_tokens=30, windows=WINDOWS, world_size=2)
    for rank, source in enumerate(sources):
        state = LoaderState(source_id="random", seed=7)
        for loaded in steps(source, state, dataclasses.replace(shape, rank=rank)):
            if loaded.after.epoch == 1:
                break
        in_epoch = source.fetched[: len(dict.fromkeys(source.fetched))]
        assert len(in_epoch) == len(set(in_epoch)), "once per rank"
        assert 6 in in_epoch, "the longest sample has pieces on both"


def test_supervised_tokens_are_counted_once() -> None:
    state = LoaderState(source_id="random", seed=7)
    totals = []
    for windows in (WHOLE, WINDOWS):
        shape = StepShape(window=2, batch_tokens=40, windows=windows)
        stream = steps(numbered_source(), state, shape)
        of_epoch = itertools.takewhile(lambda loaded: loaded.after.epoch == 0, stream)
        loaded = [*of_epoch]
        num_steps = count_steps(
            long_source(LENGTHS).lengths, long_source(LENGTHS).groups, shape, seed=7, epochs=1
        )
        assert len(loaded) == num_steps - 1
        stream = steps(numbered_source(), state, shape)
        loaded = list(itertools.islice(stream, num_steps))
        totals.append(
            (
                sum(step.num_supervised for step in loaded),
                sum(batch.num_own_tokens for step in loaded for batch in step.batches),
            )
        )
    assert totals[0] == totals[1] == (sum(LENGTHS) - 2 * len(LENGTHS), sum(LENGTHS))


def test_the_positions_drawn_of_a_sample_are_those_of_the_whole() -> None:
    draws = PositionDraws(limit=5, ttt_length=3, positions="predicted")
    state = LoaderState(source_id="random", seed=7)
    by_windows = []
    for windows in (WHOLE, WINDOWS):
        shape = StepShape(window=2, batch_tokens=40, windows=windows, draws=draws)
        found: dict[tuple[int, Position], float] = {}
        epoch = 0
        for loaded in steps(numbered_source(), state, shape):
            for batch in loaded.batches:
                assert batch.position_weights is not None
                own = batch.position_weights[batch.is_own()].tolist()
                ids = batch.input_ids[batch.is_own()].tolist()
                for one, weight in zip(ids, own, strict=True):
                    found[epoch, (one // 1000, one % 1000)] = weight
            epoch = loaded.after.epoch
            if epoch == 2:
                break
        by_windows.append(found)
    assert by_windows[0] == by_windows[1]
    of_longest = [by_windows[0][0, (6, at)] for at in range(150)]
    assert sorted(of_longest) == [0.0] * 145 + [pytest.approx(148 / 5)] * 5
    assert of_longest != [by_windows[0][1, (6, at)] for at in range(150)]
    plain = partial(draws.weights, seed=7, epoch=0)
    sample = numbered_source().fetch(6)
    assert of_longest == plain(sample.sample_id, sample.loss_mask).tolist()


def test_a_state_of_an_earlier_version_is_at_the_start_of_its_sample() -> None:
    old = '{"source_id": "random", "seed": 7, "epoch": 1, "next_sample": 5}'
    state = TypeAdapter(LoaderState).validate_json(old)
    assert state == LoaderState(source_id="random", seed=7, epoch=1, next_sample=5, next_token=0)
    stream = steps(numbered_source(), state, StepShape(window=2, batch_tokens=40, windows=WINDOWS))
    first = positions_of(next(stream))[0][0]
    order = epoch_order(numbered_source().groups, seed=7, epoch=1, window=2)
    assert first == (order[5], 0)
