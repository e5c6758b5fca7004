"""Batches in which little or nothing counts, and gradients that are not finite."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from eagle_core.draft.model import DraftModel
from eagle_core.errors import CorruptError
from eagle_core.training import checkpoint, optimizer_step
from eagle_core.training.config import TrainingConfig, TttConfig
from eagle_core.training.distributed import whole
from eagle_core.training.optimizer_step import OptimizerStep
from eagle_core.training.optimizers import make_optimizers, state_tensors
from eagle_core.training.packing import PackedBatch, pack
from eagle_core.training.ttt import TttOutcome, ttt_step
from tests.eagle_core.random_source import RandomSource, random_draft
from tests.eagle_core.training.test_trainer import (
    CONFIG,
    InterruptedHereError,
    assert_close,
    assert_equal_bits,
    interrupt_at,
    moments,
    run,
)
from tests.eagle_core.training.test_ttt import random_case, require_equal_to_plain
from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS

LOSSES = list(
    itertools.product(
        ("eagle3", "predicted"),
        ("positions", "tokens", "sequence"),
        ("cross_entropy", "lk_alpha", "lk_hybrid"),
    )
)


def options(loss: tuple[str, str, str], **changes: object) -> TttConfig:
    """Return settings with these positions, reduction and objective."""
    positions, reduction, objective = loss
    given = {"loss_positions": positions, "loss_reduction": reduction, "objective": objective}
    return TttConfig.model_validate({**given, **changes})


def trained(draft: DraftModel) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in draft.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize("loss", LOSSES, ids="-".join)
def test_targets_outside_the_vocabulary_give_zero_gradients_not_absent_ones(
    loss: tuple[str, str, str],
) -> None:
    draft, batch, head = random_case(3, [9, 5, 1])
    outside = int((~draft.t2d).nonzero()[0])
    batch = dataclasses.replace(
        batch,
        loss_mask=torch.ones_like(batch.loss_mask),
        target_argmax=torch.full_like(batch.target_argmax, outside),
    )
    outcome = ttt_step(draft, batch, head[draft.t2d], options(loss))
    assert outcome.step_supervised[0] > 0
    assert outcome.loss.item() == 0
    assert torch.equal(outcome.step_losses, torch.zeros(7, dtype=torch.float64))
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in trained(draft).items():
        assert parameter.grad is not None, name
        assert torch.count_nonzero(parameter.grad) == 0, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_moves_on_such_a_batch_as_with_zeros(optimizer: str) -> None:
    """Moments decay, steps are counted and weights decay: ranks and resumed runs stay alike."""
    config = CONFIG.model_copy(update={"optimizer": optimizer, "weight_decay": 0.1})
    found: list[dict[str, Tensor]] = []
    for is_silent in (True, False):
        draft, head = random_draft()
        optimizers = make_optimizers(draft, config)
        source = RandomSource(silent=frozenset({1}))
        for index in (0, 1):  # moments exist before the silent one
            for one in optimizers:
                one.zero_grad(set_to_none=True)
            if index == 1 and not is_silent:
                for parameter in trained(draft).values():
                    parameter.grad = torch.zeros_like(parameter)
            else:
                batch = pack([source.fetch(index)])
                ttt_step(draft, batch, head[draft.t2d], config).loss.backward()  # type: ignore[no-untyped-call]
            for one in optimizers:
                one.step()
        found.append({**draft.state_dict(), **state_tensors(optimizers, draft)})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    steps = [tensor for name, tensor in found[0].items() if name.endswith("/step")]
    assert steps
    assert all(tensor == 2 for tensor in steps)


@pytest.mark.parametrize("loss", LOSSES, ids="-".join)
def test_answers_of_one_token_count_where_they_are_predicted(loss: tuple[str, str, str]) -> None:
    draft, batch, head = random_case(5, [8, 6])
    mask = torch.zeros_like(batch.loss_mask)
    mask[[7, 12]] = True  # the last token of the first sequence, the last but one of the second
    known = int(draft.t2d.nonzero()[0])
    batch = dataclasses.replace(
        batch, loss_mask=mask, target_argmax=torch.full_like(batch.target_argmax, known)
    )
    outcome = ttt_step(draft, batch, head[draft.t2d], options(loss))
    # predicted: token t + 2 + i is the answer. eagle3: token t + i, which has a successor.
    expected = {"predicted": [2, 2, 2, 1, 1, 1, 0], "eagle3": [1, 1, 1, 1, 1, 0, 0]}
    assert outcome.step_counted.tolist() == expected[loss[0]]
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(p.grad).all() for p in trained(draft).values() if p.grad is not None)


@pytest.mark.parametrize("loss", LOSSES, ids="-".join)
@pytest.mark.parametrize("lengths", [[1], [2], [1, 1, 2], [3, 1, 5], [2, 6]], ids=str)
def test_samples_shorter_than_the_ttt_length(
    loss: tuple[str, str, str], lengths: list[int]
) -> None:
    for seed in (2, 8):
        require_equal_to_plain(seed, lengths, options(loss))


SILENT = RandomSource(silent=frozenset(range(20)))


def test_a_silent_run_counts_its_steps_and_resumes_exactly(tmp_path: Path) -> None:
    """Every weight has its optimizer's state from the first step on."""
    config = CONFIG.model_copy(update={"max_steps": 4, "weight_decay": 0.1})
    expected, result = run(tmp_path / "whole", config, source=SILENT)
    assert result.figures.loss == 0
    state = moments(tmp_path / "whole")
    names = trained(random_draft()[0])
    assert {name.rpartition("/")[0] for name in state} == set(names)
    assert all(int(state[f"{name}/step"]) == 4 for name in names)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "parts", config, source=SILENT, on_progress=interrupt_at(3))
    found, _ = run(tmp_path / "parts", config, source=SILENT)
    assert_equal_bits(found, expected)
    assert any(not torch.equal(found[name], p) for name, p in trained(random_draft()[0]).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_leaves_weights_state_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """It appears in step 4, when optimizers have moments and step 2 is saved."""
    config = CONFIG.model_copy(update={"optimizer": optimizer, "weight_decay": 0.1})
    draft, head = random_draft()
    monkeypatch.setattr(
        "tests.eagle_core.training.test_trainer.random_draft", lambda: (draft, head)
    )
    seen = Watch(draft)
    monkeypatch.setattr(optimizer_step, "make_optimizers", seen.make_optimizers)
    draft.fc.weight.register_hook(seen.break_at(4))
    with pytest.raises(CorruptError, match=r"step 4: the gradient has norm nan.*newest.*00000002"):
        run(tmp_path, config)
    seen.require_unchanged()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.read(newest).step == 2


class Watch:
    """Copies a draft and its optimizers' state before a gradient that it makes NaN."""

    def __init__(self, draft: DraftModel) -> None:
        self._draft = draft
        self._optimizers: list[torch.optim.Optimizer] = []
        self._before: dict[str, Tensor] = {}
        self._calls = 0

    def make_optimizers(
        self, draft: DraftModel, config: TrainingConfig
    ) -> list[torch.optim.Optimizer]:
        self._optimizers = make_optimizers(draft, config)
        return self._optimizers

    def break_at(self, step: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            self._calls += 1
            if self._calls < step:
                return gradient
            self.remember()
            return gradient * torch.nan

        return hook

    def remember(self) -> None:
        """Copy everything; under FSDP2 every rank must call this."""
        self._before = {name: tensor.clone() for name, tensor in self._all().items()}

    def _all(self) -> dict[str, Tensor]:
        weights = {name: whole(tensor) for name, tensor in self._draft.state_dict().items()}
        return {**weights, **state_tensors(self._optimizers, self._draft)}

    def require_unchanged(self) -> None:
        now = self._all()
        assert any("/" in name for name in now)
        assert now.keys() == self._before.keys()
        for name, tensor in now.items():
            assert torch.equal(tensor, self._before[name]), name


_RANKS = """
import json, sys
from pathlib import Path
import pytest
from eagle_core.errors import CorruptError
from eagle_core.training.distributed import join_processes
from tests.eagle_core.training import test_edges
from tests.eagle_core.training.test_trainer import CONFIG, run
with join_processes() as processes:
    for folder, config, is_broken in json.loads(sys.argv[1]):
        config = CONFIG.model_validate(config)
        if is_broken:
            test_edges.require_stop(Path(folder), config, processes.rank)
        else:
            run(Path(folder), config, source=test_edges.SILENT)
"""


def require_stop(path: Path, config: TrainingConfig, rank: int) -> None:
    """Train with a gradient that is NaN in step 4 on the second rank only; require its end."""
    with pytest.MonkeyPatch.context() as patch:
        draft, head = random_draft()
        patch.setattr("tests.eagle_core.training.test_trainer.random_draft", lambda: (draft, head))
        seen = Watch(draft)
        patch.setattr(optimizer_step, "make_optimizers", seen.make_optimizers)
        backward, numbers = OptimizerStep._backward, itertools.count(1)  # one batch in each step

        def broken(
            self: OptimizerStep, batch: PackedBatch, totals: Tensor | None, *, is_last: bool
        ) -> TttOutcome:
            outcome = backward(self, batch, totals, is_last=is_last)
            if next(numbers) == 4:
                seen.remember()
                if rank == 1:
                    gradient = next(p for p in draft.parameters() if p.requires_grad).grad
                    assert gradient is not None
                    whole_or_shard(gradient).fill_(torch.nan)
            return outcome

        patch.setattr(OptimizerStep, "_backward", broken)
        with pytest.raises(CorruptError, match=r"step 4: the gradient has norm .*no weight was"):
            run(path, config)
        seen.require_unchanged()


def whole_or_shard(gradient: Tensor) -> Tensor:
    """Return this rank's part."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


@pytest.mark.slow
def test_two_ranks_at_the_edges(tmp_path: Path) -> None:
    """Steps in which nothing counts on any rank, and a gradient that is NaN on one of them."""
    changes = {"max_steps": 3, "weight_decay": 0.1, "schedule": "constant"}
    config = CONFIG.model_copy(update=changes)
    in_turns = config.model_copy(update={"batches_per_step": 2})
    one, _ = run(tmp_path / "one", in_turns, source=SILENT)
    shardings, optimizers = ("replicate", "shard"), ("adamw", "muon")
    silent = [
        (str(tmp_path / kind), config.model_copy(update={"sharding": kind}), False)
        for kind in shardings
    ]
    broken = [
        (
            str(tmp_path / f"{kind}-{optimizer}"),
            CONFIG.model_copy(update={"sharding": kind, "optimizer": optimizer}),
            True,
        )
        for kind in shardings
        for optimizer in optimizers
    ]
    run_ranks(
        tmp_path,
        [(path, given.model_dump(mode="json"), flag) for path, given, flag in silent + broken],
    )
    for kind in shardings:
        draft, _ = random_draft()
        folder = checkpoint.newest(tmp_path / kind)
        assert folder is not None
        checkpoint.load_weights(draft, folder)
        assert_close(draft.state_dict(), one)
        assert_close(moments(tmp_path / kind), moments(tmp_path / "one"))
        assert checkpoint.read(folder).figures["loss"] == 0
        for optimizer in optimizers:
            newest = checkpoint.newest(tmp_path / f"{kind}-{optimizer}")
            assert newest is not None
            assert checkpoint.read(newest).step == 2


def run_ranks(path: Path, runs: object) -> None:
    """Run the script above in two processes."""
    script = path / "ranks.py"
    script.write_text(_RANKS)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), json.dumps(runs)),
        ],
        check=True,
        timeout=LIMIT_SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
