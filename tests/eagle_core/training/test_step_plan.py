"""A step that has its plan asks the device for nothing: a GPU is never waited for inside of it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from eagle_core.training.config import TttConfig
from eagle_core.training.ttt import batch_plan, loss_totals, ttt_step, with_plan
from tests.eagle_core.pretend_device import WaitedForError, never_waiting, pretend_device
from tests.eagle_core.training.test_ttt import random_case

OPTIONS = TttConfig(ttt_length=4)
VARIANTS: list[Mapping[str, Any]] = [
    {},
    {"num_hidden_layers": 2},
    {"sliding_window": 5},
    {"qk_norm": True, "fc_norm": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_inside_a_step_is_waited_for(variant: Mapping[str, Any]) -> None:
    draft, batch, head = random_case(5, [40, 3, 30], **variant)
    batch.loss_mask[10:] = True
    expected = ttt_step(draft, batch, head[draft.t2d], OPTIONS)
    expected.loss.backward()  # type: ignore[no-untyped-call]  # torch
    trained = [name for name, p in draft.named_parameters() if p.requires_grad]
    gradients = {name: draft.get_parameter(name).grad for name in trained}
    draft.zero_grad(set_to_none=True)
    planned, targets = with_plan(batch, draft.t2d, OPTIONS), head[draft.t2d]
    with pretend_device() as device:
        draft.to(device)
        planned, targets = planned.to(device), targets.to(device)
        with never_waiting():
            totals = loss_totals(draft.t2d, planned, OPTIONS)
            found = ttt_step(draft, planned, targets, OPTIONS, totals=totals)
            found.loss.backward()  # type: ignore[no-untyped-call]  # torch
        assert found.loss.item() == expected.loss.item() != 0
        for name in trained:
            gradient = draft.get_parameter(name).grad
            assert gradient is not None
            assert torch.equal(gradient.cpu(), gradients[name])  # type: ignore[arg-type]


def test_a_step_without_a_plan_would_wait() -> None:
    """So the check can fail."""
    draft, batch, head = random_case(5, [40, 3, 30])
    targets = head[draft.t2d]
    with pretend_device() as device:
        draft.to(device)
        batch, targets = batch.to(device), targets.to(device)
        with never_waiting(), pytest.raises(WaitedForError):
            ttt_step(draft, batch, targets, OPTIONS)


def test_a_plan_moves_as_a_whole() -> None:
    draft, batch, _ = random_case(5, [40, 3, 30])
    plan = batch_plan(draft.t2d, batch, OPTIONS)
    memory = {tensor.data_ptr() for tensor in plan.tensors() if tensor.numel()}
    copied = plan._mapped(torch.clone)
    own = {tensor.data_ptr() for tensor in copied.tensors() if tensor.numel()}
    assert len(plan.tensors()) == 4 + 4 + 1 + 4 + 4 + 5  # indices, kept and counted of four steps
    assert not memory & own
