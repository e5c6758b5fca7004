"""The loss at some positions of each sample has the gradient of all, on average and for less."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eagle_core.training import ttt
from eagle_core.training.config import LossPositions, TttConfig
from eagle_core.training.loader import LoaderState, StepShape, steps
from eagle_core.training.packing import PackedBatch
from eagle_core.training.position_draws import PositionDraws
from eagle_core.training.ttt import batch_positions, ttt_step
from tests.eagle_core.random_source import RandomSource
from tests.eagle_core.training.test_trainer import (
    CONFIG,
    InterruptedHereError,
    assert_close,
    assert_equal_bits,
    interrupt_at,
    moments,
    run,
)
from tests.eagle_core.training.test_ttt import random_case

LENGTHS = [7, 3, 6]
LIMIT = 2


def with_draws(batch: PackedBatch, options: TttConfig) -> PackedBatch:
    """Return the batch with weights for the positions that `options` lets a run draw."""
    draws = PositionDraws.of(options)
    if draws is None:
        return batch
    mask, weights = batch.loss_mask.numpy(), []
    for name, (start, end) in zip(batch.sample_ids, itertools.pairwise(batch.starts), strict=True):
        weights.append(draws.weights(name, mask[start:end], seed=0, epoch=0))
    return dataclasses.replace(batch, position_weights=torch.from_numpy(np.concatenate(weights)))


def gradients(draft: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def all_weights(batch: PackedBatch, options: TttConfig) -> list[Tensor]:
    """Return the weights [N] of every combination of subsets of LIMIT supervised indices."""
    pool = batch_positions(torch.ones(60, dtype=torch.bool), batch, options).supervised.any(dim=0)
    per_sequence = []
    for start, end in itertools.pairwise(batch.starts):
        members = pool[start:end].nonzero().squeeze(1).tolist()
        found = []
        for chosen in itertools.combinations(members, min(LIMIT, len(members))):
            weights = torch.zeros(end - start)
            weights[list(chosen)] = len(members) / max(1, len(chosen))
            found.append(weights)
        per_sequence.append(found)
    return [torch.cat(parts) for parts in itertools.product(*per_sequence)]


@pytest.mark.parametrize("positions", ["eagle3", "predicted"])
@pytest.mark.parametrize(
    ("reduction", "objective"),
    [("tokens", "cross_entropy"), ("sequence", "lk_hybrid"), ("positions", "lk_alpha")],
)
def test_the_expected_gradient_is_that_of_all_positions(
    positions: str, reduction: str, objective: str
) -> None:
    """Exactly: over all subsets, each as likely as any other."""
    given = {"loss_positions": positions, "loss_reduction": reduction, "objective": objective}
    whole = TttConfig.model_validate({**given, "ttt_length": 3})
    limited = whole.model_copy(update={"max_positions_per_sample": LIMIT})
    draft, batch, head = random_case(7, LENGTHS)
    batch.loss_mask[:] = True
    batch.loss_mask[:2] = False
    outcome = ttt_step(draft, batch, head[draft.t2d], whole)
    expected = gradients(draft, outcome.loss)
    weights = all_weights(batch, limited)
    assert len(weights) > 20
    mean = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    losses = []
    for one in weights:
        drawn = dataclasses.replace(batch, position_weights=one)
        found = ttt_step(draft, drawn, head[draft.t2d], limited)
        losses.append(found.loss.item())
        for name, gradient in gradients(draft, found.loss).items():
            mean[name] += gradient / len(weights)
    assert len(set(losses)) > 10
    assert sum(losses) / len(losses) == pytest.approx(outcome.loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(mean[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_drawn_index_takes_part_in_all_its_steps_and_no_other_in_any() -> None:
    draft, batch, _ = random_case(7, [30, 1, 24])
    batch.loss_mask[:] = True
    known = torch.ones_like(draft.t2d)
    whole = batch_positions(known, batch, TttConfig())
    limited = TttConfig(max_positions_per_sample=5)
    found = batch_positions(known, with_draws(batch, limited), limited)
    chosen = found.indices[0]
    assert (chosen < 30).sum() == (chosen > 30).sum() == 5
    for step in range(7):
        kept = torch.isin(whole.indices[step], chosen)
        assert torch.equal(found.indices[step], whole.indices[step][kept])
        assert torch.equal(found.counted[step, chosen], whole.counted[step, chosen])
    assert torch.equal(found.totals, whole.totals), "divisors count all positions"


def test_fewer_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loss, which costs most, and of attention and feed-forward."""
    rows: list[int] = []
    states: list[int] = []
    loss_of, chain = ttt.distillation_loss, ttt.chain_states

    def counting_loss(hidden: Tensor, *given: object, **named: object) -> object:
        rows.append(len(hidden))
        return loss_of(hidden, *given, **named)  # type: ignore[arg-type]

    def counting_chain(*given: object, **named: object) -> object:
        for state in chain(*given, **named):  # type: ignore[arg-type]
            states.append(len(state))
            yield state

    monkeypatch.setattr(ttt, "distillation_loss", counting_loss)
    monkeypatch.setattr(ttt, "chain_states", counting_chain)
    draft, batch, head = random_case(7, [60, 50])
    batch.loss_mask[:] = True
    for limit in (None, 4):
        options = TttConfig(max_positions_per_sample=limit)
        ttt_step(draft, with_draws(batch, options), head[draft.t2d], options)
    assert states[0] > 80
    assert max(states[7:]) <= 8
    assert rows[1] <= 8 * 7 < rows[0] / 4


def test_a_sample_with_fewer_positions_is_taken_whole() -> None:
    draft, batch, head = random_case(5, [9, 4])
    limited = TttConfig(max_positions_per_sample=9)
    expected = ttt_step(draft, batch, head[draft.t2d], TttConfig())
    drawn = with_draws(batch, limited)
    assert ttt_step(draft, drawn, head[draft.t2d], limited).loss == expected.loss


@pytest.mark.parametrize(
    ("index", "seed", "epoch", "positions", "taken", "factor"),
    [
        (0, 0, 0, "predicted", [2, 3, 8, 11], 3.75),
        (0, 0, 0, "eagle3", [2, 3, 8, 11], 4.0),
        (0, 0, 1, "predicted", [3, 7, 11, 14], 3.75),
        (3, 4, 0, "eagle3", [0, 2, 4, 5], 1.75),
        (7, 4, 2, "predicted", [0, 1], 1.0),
        (7, 4, 2, "eagle3", [0, 1, 2], 1.0),
    ],
)
def test_the_positions_are_those_that_earlier_versions_drew(
    index: int, seed: int, epoch: int, positions: LossPositions, taken: list[int], factor: float
) -> None:
    sample = RandomSource().fetch(index)
    draws = PositionDraws(limit=4, ttt_length=3, positions=positions)
    weights = draws.weights(sample.sample_id, sample.loss_mask, seed=seed, epoch=epoch)
    assert np.flatnonzero(weights).tolist() == taken
    assert set(weights[taken].tolist()) == {factor}


DRAWS = PositionDraws(limit=3, ttt_length=3, positions="predicted")


def draws_of(state: LoaderState, *, num_steps: int, **shape: int) -> dict[tuple[int, str], Tensor]:
    """Return the weights of each sample, by epoch, as one process of some loads them."""
    source = RandomSource()
    found: dict[tuple[int, str], Tensor] = {}
    for rank in range(shape.get("world_size", 1)):
        given = StepShape(window=2, rank=rank, draws=DRAWS, **shape)
        epoch = state.epoch
        for loaded in itertools.islice(steps(source, state, given), num_steps):
            for batch in loaded.batches:
                weights = batch.position_weights
                assert weights is not None
                for name, (start, end) in zip(
                    batch.sample_ids, itertools.pairwise(batch.starts), strict=True
                ):
                    found[epoch, name] = weights[start:end]
                    assert (weights[start:end] > 0).sum() == min(3, end - start - 2)
            epoch = loaded.after.epoch
    return found


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    state = LoaderState(source_id="random", seed=4)
    expected = draws_of(state, num_steps=60, batch_tokens=40)
    middle = LoaderState(source_id="random", seed=4, epoch=1, next_sample=7)
    for found in (
        draws_of(state, num_steps=9, batch_tokens=90),
        draws_of(state, num_steps=9, batch_tokens=30, batches_per_step=2, world_size=3),
        draws_of(middle, num_steps=4, batch_tokens=50),
    ):
        shared = found.keys() & expected.keys()
        assert len(shared) > 5
        assert all(torch.equal(found[key], expected[key]) for key in shared)
    other = draws_of(dataclasses.replace(state, seed=5), num_steps=9, batch_tokens=40)
    names = {name for epoch, name in expected if epoch == 0}
    assert len(names) == 20
    long = [name for name in names if len(expected[0, name]) > 6]
    for name in long:
        others = [expected[1, name], *([other[0, name]] if (0, name) in other else [])]
        assert not all(torch.equal(expected[0, name], one) for one in others)
    assert sum(torch.equal(expected[0, name], expected[1, name]) for name in long) < 2


def test_a_limited_run_resumes_exactly_and_learns(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_positions_per_sample": 3})
    expected, result = run(tmp_path / "whole", config)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", config, on_progress=interrupt_at(7))
    found, resumed = run(tmp_path / "broken", config)
    assert_equal_bits(found, expected)
    assert resumed.figures == result.figures
    everywhere, whole = run(tmp_path / "everywhere")
    assert not torch.equal(everywhere["fc.weight"], found["fc.weight"])
    held_out = result.figures.held_out_accuracies, whole.figures.held_out_accuracies
    assert len(held_out[0]) == len(held_out[1]) == 3


def test_accumulated_batches_of_a_limited_run_make_the_step_of_one(tmp_path: Path) -> None:
    """Divisors count the positions of all batches, drawn or not."""
    changes = {"max_steps": 1, "batch_tokens": 10**6, "max_grad_norm": 1e9}
    whole = CONFIG.model_copy(update={**changes, "max_positions_per_sample": 3})
    source = RandomSource(num_samples=8)
    one, _ = run(tmp_path / "one", whole, source=source)
    parts = whole.model_copy(update={"batch_tokens": 40, "batches_per_step": 100})
    many, _ = run(tmp_path / "many", parts, source=source)
    assert_close(many, one)
    assert_close(moments(tmp_path / "many"), moments(tmp_path / "one"))
