"""The estimate of training's memory, against what torch's allocator counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TrainingConfig
from eagle_core.training.optimizers import make_optimizers
from eagle_core.training.packing import PackedBatch
from eagle_core.training.step_memory import training_memory
from eagle_core.training.ttt import ttt_step

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "target_hidden_size": 192,
    "intermediate_size": 640,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "draft_vocab_size": 512,
}
TOKENS = 2048


def made_batch(config: DraftConfig) -> PackedBatch:
    """Return a batch of four sequences in which every position counts."""
    generator = torch.Generator().manual_seed(0)

    def states(width: int) -> torch.Tensor:
        return torch.randn(TOKENS, width, generator=generator).bfloat16()

    return PackedBatch(
        sample_ids=("a", "b", "c", "d"),
        starts=tuple(range(0, TOKENS + 1, TOKENS // 4)),
        input_ids=torch.randint(config.vocab_size, (TOKENS,), generator=generator),
        loss_mask=torch.ones(TOKENS, dtype=torch.bool),
        aux_hidden_states=states(3 * config.target_hidden_size),
        last_hidden_state=states(config.target_hidden_size),
        target_argmax=torch.randint(config.draft_vocab_size, (TOKENS,), generator=generator),
        target_logsumexp=torch.full((TOKENS,), 9.0),
    )


def made_draft(config: DraftConfig) -> DraftModel:
    """Return a random draft whose vocabulary is the first D tokens."""
    draft = DraftModel(config)
    draft.t2d[: config.draft_vocab_size] = True
    return draft


def peak_bytes(work: Callable[[], None]) -> int:
    """Return the most bytes that `work` holds at once, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]  # torch
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [{}, {"num_hidden_layers": 2}, {"intermediate_size": 1280}])
def test_a_step_takes_what_was_estimated(
    change: dict[str, Any],
    dtype: torch.dtype,
    is_checkpointed: bool,
) -> None:
    config = DraftConfig(**{**SIZES, **change})
    draft, batch = made_draft(config), made_batch(config)
    training = TrainingConfig(
        ttt_length=5, batch_tokens=TOKENS, gradient_checkpointing=is_checkpointed
    )
    head = torch.randn(config.draft_vocab_size, config.target_hidden_size).to(dtype)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            outcome = ttt_step(draft, batch, head, training)
        outcome.loss.backward()  # type: ignore[no-untyped-call]  # torch

    measured = peak_bytes(step)
    found = training_memory(config, training, dtype, CPU)
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    states = batch.aux_hidden_states.nbytes + batch.last_hidden_state.nbytes
    rounded = trained * dtype.itemsize if dtype != torch.float32 else 0
    assert measured == pytest.approx(found.batch - states + found.gradients + rounded, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_are_counted(optimizer: str) -> None:
    config = DraftConfig(**SIZES, attention_bias=True, fc_norm=True)
    draft = made_draft(config)
    training = TrainingConfig.model_validate({"optimizer": optimizer})
    optimizers = make_optimizers(draft, training)
    for parameter in draft.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    for one in optimizers:
        one.step()
    states = sum(
        value.nbytes
        for one in optimizers
        for state in one.state.values()
        for value in state.values()
        if value.ndim
    )
    found = training_memory(config, training, torch.float32, CPU)
    assert found.optimizer == states
    assert found.gradients == sum(p.grad.nbytes for p in draft.parameters() if p.grad is not None)
    head_rows = config.draft_vocab_size * config.target_hidden_size * 4
    assert found.weights == sum(p.nbytes for p in draft.parameters()) + head_rows


def test_shards_divide_the_states_of_the_optimizer() -> None:
    config = DraftConfig(**SIZES)
    whole, shared = (
        training_memory(
            config,
            TrainingConfig.model_validate({"num_processes": 4, "sharding": sharding}),
            torch.bfloat16,
            CPU,
        )
        for sharding in ("replicate", "shard")
    )
    assert shared.optimizer == whole.optimizer // 4
    assert shared.total < whole.total
