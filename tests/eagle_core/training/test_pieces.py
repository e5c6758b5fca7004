"""A long sample in pieces is the whole sample: each position once, and no batch too large."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample
from eagle_core.training.config import WHOLE_SAMPLES, LossPositions, TrainingConfig, TttConfig
from eagle_core.training.packing import PackedBatch, pack
from eagle_core.training.pieces import WHOLE, PieceReader, Windows, piece_batches
from eagle_core.training.position_draws import PositionDraws
from eagle_core.training.ttt import TttOutcome, batch_positions, loss_totals, ttt_step
from eagle_core.training.validation import held_out_batches, measure, measuring_step
from tests.eagle_core.long_source import long_source
from tests.eagle_core.one_sample_source import OneSampleSource
from tests.eagle_core.random_source import RandomSource, random_draft

windows_of_any_size = st.builds(
    lambda before, after, stride: Windows(
        tokens=before + after + stride, before=before, after=after
    ),
    st.integers(0, 12),
    st.integers(0, 6),
    st.integers(1, 30),
)


@given(
    windows=windows_of_any_size,
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    data=st.data(),
)
def test_pieces_own_each_position_once_and_have_what_it_reads(
    windows: Windows, lengths: list[int], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, lengths[0] - 1))
    pieces = windows.pieces(np.array(lengths), first)
    owned = [
        (int(sample), position)
        for sample, start, end in zip(pieces.sample, pieces.own_start, pieces.own_end, strict=True)
        for position in range(start, end)
    ]
    expected = [(n, p) for n, length in enumerate(lengths) for p in range(length)][first:]
    assert owned == expected, "in the order of the text"
    assert pieces.sizes.max() <= windows.tokens
    assert (pieces.own_end > pieces.own_start).all()
    ends = np.array(lengths)[pieces.sample]
    assert (pieces.start == np.maximum(0, pieces.own_start - windows.before)).all()
    assert (pieces.end >= np.minimum(ends, pieces.own_end + windows.after)).all()
    assert (pieces.own_end[pieces.end == ends] == ends[pieces.end == ends]).all()


@given(windows=windows_of_any_size, length=st.integers(1, 200), data=st.data())
def test_a_piece_depends_only_on_where_it_begins(
    windows: Windows, length: int, data: st.DataObject
) -> None:
    whole = windows.pieces(np.array([length]))
    number = data.draw(st.integers(0, len(whole) - 1))
    rest = windows.pieces(np.array([length]), int(whole.own_start[number]))
    for field in dataclasses.fields(rest):
        expected = getattr(whole, field.name)[number:]
        assert getattr(rest, field.name).tolist() == expected.tolist()


@pytest.mark.parametrize(("length", "count"), [(1, 1), (39, 1), (40, 1), (41, 2), (66, 2), (67, 3)])
def test_a_sample_is_divided_only_if_it_is_longer_than_the_window(length: int, count: int) -> None:
    windows = Windows(tokens=40, before=10, after=4)
    pieces = windows.pieces(np.array([length]))
    assert len(pieces) == count
    assert pieces.sizes.sum() - length == (count - 1) * 14


def test_a_million_samples_are_cheap() -> None:
    lengths = np.full(1_000_000, 100)
    lengths[::1000] = 10_000
    pieces = Windows(tokens=4096, before=1024, after=8).pieces(lengths)
    assert len(pieces) == 1_000_000 + 1000 * 2
    assert WHOLE.pieces(lengths).sizes.tolist() == lengths.tolist()


@pytest.mark.parametrize(
    ("variant", "tokens", "before"),
    [
        ({}, 200, 50),
        ({"sliding_window": 1}, 200, 0),
        ({"sliding_window": 60}, 200, 59),
        ({"sliding_window": 101}, 200, 100),
        ({"sliding_window": 102}, 200, 50),
        ({"sliding_window": 40, "num_hidden_layers": 2}, 200, 78),
        ({"sliding_window": 40, "num_hidden_layers": 3}, 200, 50),
    ],
)
def test_the_context_of_a_piece_is_what_the_draft_sees_or_a_quarter(
    variant: dict[str, int], tokens: int, before: int
) -> None:
    draft, _ = random_draft(**variant)
    config = TrainingConfig(window_tokens=tokens, ttt_length=5)
    assert Windows.of(config, draft.config) == Windows(tokens=tokens, before=before, after=6)


def test_the_window_is_the_batch_unless_it_is_given() -> None:
    assert TrainingConfig(batch_tokens=4096).piece_tokens == 4096
    assert TrainingConfig(batch_tokens=4096, window_tokens=1000).piece_tokens == 1000
    assert TrainingConfig(batch_tokens=1, ttt_length=7).piece_tokens == 32, "one sample per batch"
    assert TrainingConfig(window_tokens=32, ttt_length=7).piece_tokens == 32
    with pytest.raises(ValidationError, match=r"window_tokens is 31.* needs 32 tokens or more"):
        TrainingConfig(window_tokens=31, ttt_length=7)
    with pytest.raises(ConfigError, match=r"window of 14 tokens is too small.*window_tokens"):
        Windows(tokens=14, before=10, after=4)


@pytest.mark.parametrize("ttt_length", range(1, 8))
@pytest.mark.parametrize("sliding", [None, 1, 2, 5, 8, 9, 17, 100])
def test_the_smallest_window_is_large_enough_for_every_draft(
    ttt_length: int, sliding: int | None
) -> None:
    draft, _ = random_draft(sliding_window=sliding)
    config = TrainingConfig(window_tokens=4 * (ttt_length + 1), ttt_length=ttt_length)
    assert Windows.of(config, draft.config).stride >= 1


def sample_of(length: int, *, seed: int = 0, answers: str = "long") -> HiddenStateSample:
    """Return a sample whose supervised tokens are in one long answer, or in many short ones."""
    sample = long_source([length], seed=seed, num_groups=1).fetch(0)
    token = np.arange(length)
    mask = token >= 5 if answers == "long" else token % 7 == 3
    return dataclasses.replace(sample, loss_mask=mask)


def as_float32(batch: PackedBatch) -> PackedBatch:
    return dataclasses.replace(
        batch,
        aux_hidden_states=batch.aux_hidden_states.float(),
        last_hidden_state=batch.last_hidden_state.float(),
    )


def summed(
    draft: DraftModel, head: Tensor, batches: list[PackedBatch], options: TttConfig
) -> tuple[list[TttOutcome], dict[str, Tensor]]:
    """Return the outcomes of the batches, divided by the totals of all, and their gradient."""
    totals = torch.stack([loss_totals(draft.t2d, batch, options) for batch in batches]).sum(dim=0)
    draft.zero_grad(set_to_none=True)
    outcomes = []
    for batch in batches:
        outcome = ttt_step(draft, as_float32(batch), head[draft.t2d], options, totals=totals)
        outcome.loss.backward()  # type: ignore[no-untyped-call]  # torch
        outcomes.append(outcome)
    named = dict(draft.named_parameters())
    return outcomes, {name: p.grad for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("answers", ["long", "short"])
@pytest.mark.parametrize("positions", ["eagle3", "predicted"])
@pytest.mark.parametrize(
    ("variant", "reduction"),
    [
        ({"sliding_window": 6}, "tokens"),
        ({"sliding_window": 1}, "positions"),
        ({"sliding_window": 4, "num_hidden_layers": 3}, "tokens"),
    ],
    ids=str,
)
def test_loss_and_gradient_of_the_pieces_are_those_of_the_whole(
    variant: dict[str, int], reduction: str, positions: str, answers: str
) -> None:
    """With a draft that does not see beyond the context of a piece; several lengths together."""
    given = {"ttt_length": 4, "loss_positions": positions, "loss_reduction": reduction}
    config = TrainingConfig.model_validate({**given, "window_tokens": 30})
    draft, head = random_draft(3, **variant)
    windows = Windows.of(config, draft.config)
    samples = [sample_of(length, answers=answers) for length in (30, 31, 97)]
    expected, gradient = summed(draft, head, list(piece_batches(samples, WHOLE)), config)
    pieces = list(piece_batches(samples, windows))
    assert len(pieces) > 6
    assert max(piece.num_tokens for piece in pieces) <= 30
    found, of_pieces = summed(draft, head, pieces, config)
    for name in ("loss", *(field.name for field in dataclasses.fields(TttOutcome))):
        one, other = (sum(getattr(each, name) for each in some) for some in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)
    assert of_pieces.keys() == gradient.keys()
    for name, whole in gradient.items():
        torch.testing.assert_close(of_pieces[name], whole, rtol=1e-4, atol=1e-6, msg=name)
        assert whole.abs().max() > 0


def test_with_less_context_they_are_not() -> None:
    """So the check can fail."""
    config = TrainingConfig(ttt_length=4, window_tokens=30)
    draft, head = random_draft(3, sliding_window=6)
    samples = [sample_of(97)]
    _, gradient = summed(draft, head, list(piece_batches(samples, WHOLE)), config)
    less = Windows(tokens=30, before=4, after=5)
    _, found = summed(draft, head, list(piece_batches(samples, less)), config)
    assert not torch.allclose(found["fc.weight"], gradient["fc.weight"], rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 90),
    ttt_length=st.integers(1, 7),
    before=st.integers(0, 9),
    stride=st.integers(1, 20),
    positions=st.sampled_from(["eagle3", "predicted"]),
    limit=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_term_of_the_loss_counts_once_whatever_the_context(
    length: int,
    ttt_length: int,
    before: int,
    stride: int,
    positions: LossPositions,
    limit: int | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < rng.random()
    sample = dataclasses.replace(sample_of(length), loss_mask=mask)
    options = TttConfig(
        ttt_length=ttt_length, loss_positions=positions, max_positions_per_sample=limit
    )
    after = ttt_length + 1
    windows = Windows(tokens=before + stride + after, before=before, after=after)
    known = torch.from_numpy(rng.random(50) < 0.7)
    whole, divided = (terms(sample, some, known, options) for some in (WHOLE, windows))
    assert divided == whole
    assert set(Counter(key[:2] for key in divided[0]).values()) <= {1}


def terms(
    sample: HiddenStateSample, windows: Windows, known: Tensor, options: TttConfig
) -> tuple[Counter[tuple[int, int, float]], list[float], int]:
    """Return the (position, step, share) that count, the divisors and the supervised terms."""
    source, draws = OneSampleSource(sample), PositionDraws.of(options)
    pieces, reader = windows.pieces(source.lengths), PieceReader(source)
    found: Counter[tuple[int, int, float]] = Counter()
    totals, supervised = torch.zeros(options.ttt_length), 0
    for number, start in enumerate(pieces.start.tolist()):
        batch = reader.read(
            pieces[number : number + 1],
            None
            if draws is None
            else lambda name, mask: draws.weights(name, mask, seed=1, epoch=2),
        )
        at = batch_positions(known, batch, options)
        totals += at.totals
        supervised += int(at.supervised.sum())
        for step, index in at.counted.nonzero().tolist():
            found[start + index, step, at.shares[step, index].item()] += 1
    return found, totals.tolist(), supervised


@pytest.mark.parametrize("border", range(20, 32))
def test_an_answer_of_one_token_counts_once_wherever_a_border_is(border: int) -> None:
    sample = sample_of(60)
    mask = np.arange(60) == border
    known = torch.ones(50, dtype=torch.bool)
    windows = Windows(tokens=30, before=7, after=5)
    for positions in ("eagle3", "predicted"):
        options = TttConfig.model_validate({"ttt_length": 4, "loss_positions": positions})
        one = dataclasses.replace(sample, loss_mask=mask)
        found, totals, supervised = terms(one, windows, known, options)
        assert supervised == len(found) == 4
        assert totals == [1.0] * 4


def test_tokens_before_and_after_are_no_tokens_of_the_batch() -> None:
    sample = sample_of(97)
    windows = Windows(tokens=30, before=10, after=5)
    batches = list(piece_batches([sample], windows))
    assert [batch.num_own_tokens for batch in batches[:2]] == [25, 15]
    assert (
        sum(batch.num_own_tokens for batch in batches)
        == 97
        < sum(batch.num_tokens for batch in batches)
    )
    assert sum(int((batch.loss_mask & batch.is_own()).sum()) for batch in batches) == 92
    whole = pack([sample])
    assert whole.own is None
    assert whole.num_own_tokens == whole.num_tokens == int(whole.is_own().sum()) == 97


def test_pieces_are_packed_with_other_samples() -> None:
    """In a batch each piece has its own positions only, and its tokens are those of the sample."""
    source = long_source([12, 97, 9], num_groups=1)
    windows = Windows(tokens=30, before=10, after=5)
    pieces = windows.pieces(source.lengths)
    batch = PieceReader(source).read(pieces[:3])
    whole = pack([source.fetch(0), source.fetch(1)])
    assert batch.starts == (0, 12, 42, 72)
    assert batch.own == (range(12), range(12, 37), range(52, 67))
    assert torch.equal(batch.input_ids[:42], whole.input_ids[:42])
    assert torch.equal(batch.aux_hidden_states[42:72], whole.aux_hidden_states[27:57])


def test_a_sample_is_fetched_once_for_all_its_pieces() -> None:
    class CountingSource(RandomSource):
        fetched: list[int]

        def fetch(self, index: int) -> HiddenStateSample:
            self.fetched.append(index)
            return super().fetch(index)

    source = CountingSource(num_samples=3)
    source.fetched = []
    source.lengths = np.array([80, 70, 4])
    reader, windows = PieceReader(source), Windows(tokens=20, before=5, after=3)
    pieces = windows.pieces(source.lengths)
    for number in range(len(pieces)):
        reader.read(pieces[number : number + 1])
    assert source.fetched == [0, 1, 2]
    assert reader._held is None, "the last sample takes no memory any more"


def test_held_out_figures_of_the_pieces_are_those_of_the_whole() -> None:
    """Also the joint prefix: all steps of a position are in one piece."""
    config = TrainingConfig(ttt_length=4, window_tokens=30)
    draft, head = random_draft(3, sliding_window=6)
    source = long_source([20, 97, 30, 64])
    step = measuring_step(draft, config, torch.float32)
    windows = Windows.of(config, draft.config)
    found, expected = (
        measure(
            step,
            map(as_float32, held_out_batches(source, some, batch_tokens=40, max_tokens=10**6)),
            head[draft.t2d],
        )
        for some in (windows, WHOLE)
    )
    for field in dataclasses.fields(found):
        assert getattr(found, field.name) == pytest.approx(getattr(expected, field.name), rel=1e-5)
    assert found.length > 1
    batches = list(held_out_batches(source, windows, batch_tokens=40, max_tokens=100))
    assert max(batch.num_tokens for batch in batches) <= 40
    assert 100 <= sum(batch.num_own_tokens for batch in batches) < 130


def test_whole_samples_are_one_piece_each() -> None:
    config = TrainingConfig(window_tokens=WHOLE_SAMPLES)
    windows = Windows.of(config, random_draft()[0].config)
    lengths = np.array([3, 10**6])
    assert windows.pieces(lengths).sizes.tolist() == [3, 10**6]
    rest = windows.pieces(lengths[1:], 500_000)
    assert (rest.start.tolist(), rest.own_start.tolist()) == ([0], [500_000])
