"""A draft that was trained on some aux states fuses others to the nearest states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from eagle_core.bfloat16 import widened
from eagle_core.closed_form.refit import KnownAux, refit_fusing_matrix
from eagle_core.errors import ConfigError
from eagle_core.training.distributed import ONE_PROCESS, Processes
from eagle_core.training.packing import PackedBatch, pack
from tests.eagle_core.closed_form.linear_source import (
    CHANNEL_SIZES,
    LinearSource,
    random_matrix,
    small_draft,
)

WIDTH = len(CHANNEL_SIZES)
MIXED = random_matrix(11, WIDTH, WIDTH)


def batches() -> Sequence[PackedBatch]:
    source = LinearSource()
    return [pack([source.fetch(row) for row in range(first, first + 30)]) for first in (0, 30, 60)]


def mixed(batch: PackedBatch) -> Tensor:
    """Return aux states of which those of the batch are a linear map."""
    return widened(batch.aux_hidden_states) / CHANNEL_SIZES @ MIXED.T


def unrelated(batch: PackedBatch) -> Tensor:
    generator = torch.Generator().manual_seed(batch.num_tokens)
    return torch.randn(batch.num_tokens, WIDTH, generator=generator)


def each(states: Callable[[PackedBatch], Tensor]) -> KnownAux:
    """Return what gives these states of one batch after the other."""
    return lambda given: ((batch, states(batch)) for batch in given)


@pytest.mark.parametrize("has_norms", [False, True])
def test_other_layers_give_the_fused_states_that_the_draft_knows(*, has_norms: bool) -> None:
    draft = small_draft(fc_norm=has_norms)
    others = {name: part.clone() for name, part in draft.state_dict().items() if name[:3] != "fc."}
    if has_norms:  # features are not a linear map of the known ones: nearly one suffices
        misfit = refit_fusing_matrix(draft, batches(), each(mixed), ONE_PROCESS)
        assert 0 < misfit < 0.2
        return
    expected = [draft.fuse(mixed(batch)).detach() for batch in batches()]
    misfit = refit_fusing_matrix(draft, batches(), each(mixed), ONE_PROCESS)
    assert 0 < misfit < 1e-3
    fused = [draft.fuse(widened(batch.aux_hidden_states)).detach() for batch in batches()]
    missing = torch.cat(fused) - torch.cat(expected)
    share = missing.square().sum() / torch.cat(expected).square().sum()
    assert share.item() == pytest.approx(misfit, rel=0.05)
    assert all(torch.equal(part, draft.state_dict()[name]) for name, part in others.items())


def test_states_that_tell_nothing_of_the_known_ones_are_a_misfit() -> None:
    assert refit_fusing_matrix(small_draft(), batches(), each(unrelated), ONE_PROCESS) > 0.9


@dataclass(frozen=True, kw_only=True)
class Half(Processes):
    """One of two processes: keeps its own sums, and adds those of the other."""

    others: Sequence[Tensor] = ()
    own: list[Tensor] = field(default_factory=list)

    def total(self, values: Tensor) -> Tensor:
        self.own.append(values.clone())
        return values + self.others[len(self.own) - 1] if self.others else values


def test_two_processes_solve_what_one_does() -> None:
    alone, second, first = small_draft(), small_draft(), small_draft()
    misfit = refit_fusing_matrix(alone, batches(), each(mixed), ONE_PROCESS)
    other = Half(rank=1, world_size=2)
    refit_fusing_matrix(second, batches()[2:], each(mixed), other)
    half = Half(rank=0, world_size=2, others=other.own)
    shared = refit_fusing_matrix(first, batches()[:2], each(mixed), half)
    assert shared == pytest.approx(misfit, rel=1e-6)
    assert torch.allclose(first.fc.weight, alone.fc.weight, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(second.fc.weight, alone.fc.weight, rtol=1e-2)


def test_states_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        refit_fusing_matrix(
            small_draft(), batches(), each(lambda one: mixed(one) * float("nan")), ONE_PROCESS
        )
