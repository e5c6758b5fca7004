"""The loss at some positions of each sample has the gradient of all, on average and for less."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eagle_core.training import ttt
from eagle_core.training.config import TttConfig
from eagle_core.training.loader import LoaderState, StepShape, steps
from eagle_core.training.packing import PackedBatch
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


def gradients(draft: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def all_draws(batch: PackedBatch, options: TttConfig) -> list[Tensor]:
    """Return draws [N] of every combination of subsets of LIMIT supervised indices."""
    pool = batch_positions(torch.ones(60, dtype=torch.bool), batch, options).supervised.any(dim=0)
    per_sequence = []
    for start, end in itertools.pairwise(batch.starts):
        members = pool[start:end].nonzero().squeeze(1).tolist()
        found = []
        for chosen in itertools.combinations(members, min(LIMIT, len(members))):
            first = [*chosen, *(index for index in range(end - start) if index not in chosen)]
            draws = torch.empty(end - start, dtype=torch.int64)
            draws[torch.tensor(first)] = torch.arange(end - start)
            found.append(draws)
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
    draws = all_draws(batch, limited)
    assert len(draws) > 20
    mean = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    losses = []
    for one in draws:
        drawn = dataclasses.replace(batch, draws=one)
        found = ttt_step(draft, drawn, head[draft.t2d], limited)
        losses.append(found.loss.item())
        for name, gradient in gradients(draft, found.loss).items():
            mean[name] += gradient / len(draws)
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
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(length, generator=generator) for length in (30, 1, 24)]
    found = batch_positions(known, dataclasses.replace(batch, draws=torch.cat(draws)), limited)
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
    batch = dataclasses.replace(batch, draws=torch.cat([torch.randperm(60), torch.randperm(50)]))
    for limit in (None, 4):
        options = TttConfig(max_positions_per_sample=limit)
        ttt_step(draft, batch, head[draft.t2d], options)
    assert states[0] > 80
    assert max(states[7:]) <= 8
    assert rows[1] <= 8 * 7 < rows[0] / 4


def test_a_sample_with_fewer_positions_is_taken_whole() -> None:
    draft, batch, head = random_case(5, [9, 4])
    draws = torch.cat([torch.randperm(9), torch.randperm(4)])
    limited = TttConfig(max_positions_per_sample=9)
    expected = ttt_step(draft, batch, head[draft.t2d], TttConfig())
    drawn = dataclasses.replace(batch, draws=draws)
    assert ttt_step(draft, drawn, head[draft.t2d], limited).loss == expected.loss


def draws_of(state: LoaderState, *, num_steps: int, **shape: int) -> dict[tuple[int, str], Tensor]:
    """Return the draws of each sample, by epoch, as one process of some loads them."""
    source = RandomSource()
    found: dict[tuple[int, str], Tensor] = {}
    for rank in range(shape.get("world_size", 1)):
        given = StepShape(window=2, rank=rank, draws_positions=True, **shape)
        epoch = state.epoch
        for loaded in itertools.islice(steps(source, state, given), num_steps):
            for batch in loaded.batches:
                assert batch.draws is not None
                for name, (start, end) in zip(
                    batch.sample_ids, itertools.pairwise(batch.starts), strict=True
                ):
                    found[epoch, name] = batch.draws[start:end]
                    assert sorted(batch.draws[start:end].tolist()) == list(range(end - start))
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
    assert not any(torch.equal(expected[0, name], expected[1, name]) for name in long)
    assert not any(torch.equal(expected[0, n], other[0, n]) for n in long if (0, n) in other)


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
