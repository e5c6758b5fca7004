"""The training step against golden vectors and against the plain formulation."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import golden
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.packing import PackedBatch
from eagle_core.training.ttt import ttt_step
from tests import needs
from tests.eagle_core.training.plain_ttt import plain_loss
from tests.paths import GOLDEN


def test_golden_vectors_are_there() -> None:
    assert len(GOLDEN) >= 4


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_vectors(path: Path) -> None:
    deviations = golden.compare(path)
    assert deviations.loss <= golden.LOSS_TOLERANCE
    assert deviations.gradient <= golden.GRADIENT_TOLERANCE
    assert deviations.accuracy == 0
    assert deviations.acceptance <= golden.LOSS_TOLERANCE


def test_golden_tool_fails_on_a_changed_vector(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(GOLDEN[0], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["input.aux_hidden_states"][40, 3] += 0.5
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed, metadata=metadata)
    assert golden.main([str(changed)]) == 1
    assert golden.main([str(GOLDEN[0])]) == 0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"fc_norm": True, "norm_output": True},
    {"num_hidden_layers": 2},
    {"attention_bias": True, "num_hidden_layers": 2},
    {"mlp_bias": True, "num_hidden_layers": 2},
    {"qk_norm": True},
    {"sliding_window": 1},
    {"sliding_window": 3},
    {"sliding_window": 6, "num_hidden_layers": 3},
    {"rope_scaling": YARN},
    {"norm_before_fc": True},
    {"norm_before_residual": True},
    {"target_head": True, "draft_vocab_size": 60, "hidden_size": 20},
    {
        "num_hidden_layers": 4,
        "attention_bias": True,
        "qk_norm": True,
        "sliding_window": 4,
        "rope_scaling": YARN,
        "norm_before_fc": True,
        "fc_norm": True,
        "norm_output": True,
        "norm_before_residual": True,
        "target_head": True,
        "draft_vocab_size": 60,
        "hidden_size": 20,
    },
]


def random_case(
    seed: int, lengths: list[int], **variant: Any
) -> tuple[DraftModel, PackedBatch, torch.Tensor]:
    """Return a draft, a batch of sequences of `lengths`, and the target's head, in float64.

    `variant` are fields of the draft's configuration.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    heads, kv_heads = [(4, 4), (4, 2), (2, 1)][seed % 3]
    sizes = {
        "hidden_size": 24,
        "target_hidden_size": 20,
        "intermediate_size": 40,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "vocab_size": 60,
        "draft_vocab_size": 25 + seed % 36,
    }
    config = DraftConfig.model_validate({**sizes, **variant})
    draft = DraftModel(config).double()
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chosen = np.sort(rng.choice(60, config.draft_vocab_size, replace=False))
    draft.t2d[torch.from_numpy(chosen)] = True
    draft.d2t.copy_(torch.from_numpy(chosen - np.arange(len(chosen))))
    num_tokens = sum(lengths)
    target_lm_head = torch.randn(60, 20, dtype=torch.float64)
    last = torch.randn(num_tokens, 20, dtype=torch.float64)
    logits = last @ target_lm_head.T
    batch = PackedBatch(
        sample_ids=tuple(str(number) for number in range(len(lengths))),
        starts=(0, *np.cumsum(lengths).tolist()),
        input_ids=torch.from_numpy(rng.integers(0, 60, num_tokens)),
        loss_mask=torch.from_numpy(rng.random(num_tokens) < rng.random()),
        aux_hidden_states=torch.randn(num_tokens, 60, dtype=torch.float64),
        last_hidden_state=last,
        target_argmax=logits.argmax(dim=-1),
        target_logsumexp=logits.logsumexp(dim=-1),
    )
    return draft, batch, target_lm_head


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(2, 24), min_size=1, max_size=4),
    ttt_length=st.integers(1, 7),
    positions=st.sampled_from(["eagle3", "predicted"]),
    reduction=st.sampled_from(["positions", "tokens", "sequence"]),
    objective=st.sampled_from(["cross_entropy", "lk_alpha", "lk_hybrid"]),
    variant=st.sampled_from(VARIANTS),
    checkpointing=st.booleans(),
    block=st.sampled_from([1, 3, 256]),
)
def test_equals_the_plain_formulation(
    *,
    seed: int,
    lengths: list[int],
    ttt_length: int,
    positions: str,
    reduction: str,
    objective: str,
    variant: dict[str, Any],
    checkpointing: bool,
    block: int,
) -> None:
    options = TttConfig(
        ttt_length=ttt_length,
        loss_positions=positions,  # type: ignore[arg-type]
        loss_reduction=reduction,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing,
    )
    with pytest.MonkeyPatch.context() as patch:  # many blocks of few rows, or one of all
        patch.setattr("eagle_core.training.attention.BLOCK_QUERIES", block)
        patch.setattr("eagle_core.training.loss.CHUNK_ROWS", 4 * block)
        patch.setattr("eagle_core.training.loss.TILE_BYTES", 400 * block)
        require_equal_to_plain(seed, lengths, options, **variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant) or "plain")
@pytest.mark.parametrize("block", [2, 256])
def test_every_variant_equals_the_plain_formulation(
    variant: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle_core.training.attention.BLOCK_QUERIES", block)
    for seed, checkpointing in ((0, False), (1, True), (2, False)):
        options = TttConfig(ttt_length=5, gradient_checkpointing=checkpointing)
        require_equal_to_plain(seed, [17, 9, 23], options, **variant)


def require_equal_to_plain(
    seed: int, lengths: list[int], options: TttConfig, **variant: Any
) -> None:
    """Compare loss and gradients of a random case with those of the plain formulation."""
    draft, batch, target_lm_head = random_case(seed, lengths, **variant)
    expected = plain_loss(draft, batch, target_lm_head, options)
    expected.backward()
    gradients = {name: p.grad for name, p in draft.named_parameters() if p.requires_grad}
    draft.zero_grad(set_to_none=True)

    outcome = ttt_step(draft, batch, target_lm_head[draft.t2d], options)
    outcome.loss.backward()

    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            plain = gradients[name] if gradients[name] is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1], {"sliding_window": 2}])
def test_a_batch_without_supervised_token_gives_zero_loss_and_no_nan(
    variant: dict[str, Any],
) -> None:
    draft, batch, target_lm_head = random_case(3, [9, 5], **variant)
    batch.loss_mask.fill_(value=False)
    outcome = ttt_step(draft, batch, target_lm_head[draft.t2d], TttConfig())
    assert outcome.loss.item() == 0
    assert torch.isfinite(outcome.step_losses).all()
    outcome.loss.backward()
    for name, parameter in draft.named_parameters():  # other ranks would wait for a missing one
        assert not parameter.requires_grad or torch.count_nonzero(parameter.grad) == 0, name


@pytest.mark.parametrize(
    ("added_tokens", "variant"),
    [
        (7, {}),
        (512, {}),
        (512, {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
        (512, {"qk_norm": True, "sliding_window": 4, "rope_scaling": YARN}),
        (512, {"norm_before_fc": True, "norm_before_residual": True}),
    ],
)
def test_bfloat16_comes_near_float32(
    added_tokens: int, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle_core.training.loss._ADDED_TOKENS", added_tokens)
    draft, batch, head = random_case(5, [20, 13], **variant)
    draft, head = draft.float(), head.float()
    for parameter in draft.parameters():
        parameter.data *= 0.3  # nearer to a model's: no state explodes over the steps
    batch = dataclasses.replace(
        batch,
        loss_mask=torch.ones_like(batch.loss_mask),
        aux_hidden_states=batch.aux_hidden_states.float(),
        last_hidden_state=batch.last_hidden_state.float(),
        target_logsumexp=batch.target_logsumexp.float(),
    )
    expected = ttt_step(draft, batch, head[draft.t2d], TttConfig())
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in draft.named_parameters() if p.requires_grad}
    draft.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ttt_step(draft, batch, head[draft.t2d].bfloat16(), TttConfig())
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-2)
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32  # masters stay wide
            deviation = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            # Softmax does not see a shift of all keys, but for their rotation: little is left.
            assert deviation < (0.1 if name.endswith("k_proj.bias") else 0.05), name


def test_of_equal_logits_only_the_first_is_a_hit_where_accuracy_is_measured() -> None:
    """Decoding takes the first; in bfloat16 equals are common."""
    draft, batch, head = random_case(4, [21, 9])
    with torch.no_grad():
        draft.lm_head.weight.zero_()
        measured = ttt_step(draft, batch, head[draft.t2d], TttConfig())
    first = int(draft.d2t[0])
    active = measured.step_counted[0]
    hits = measured.step_correct[0]
    supervised = batch.loss_mask & (batch.target_argmax == first)
    assert hits <= supervised.sum() < active


@pytest.mark.parametrize("objective", ["cross_entropy", "lk_alpha", "lk_hybrid"])
def test_acceptance_is_measured_where_no_gradient_is_made(objective: str) -> None:
    draft, batch, head = random_case(4, [21, 9])
    options = TttConfig(objective=objective)  # type: ignore[arg-type]
    training = ttt_step(draft, batch, head[draft.t2d], options)
    with torch.no_grad():
        measured = ttt_step(draft, batch, head[draft.t2d], options)
    assert not measured.loss.requires_grad
    assert measured.loss == training.loss
    counted = measured.step_counted > 0
    share = (measured.step_acceptance / measured.step_counted)[counted]
    assert ((share > 0) & (share < 1)).all()
    if objective == "cross_entropy":
        assert training.step_acceptance[counted].isnan().all()
    else:
        assert torch.equal(training.step_acceptance, measured.step_acceptance)


def test_joint_prefixes_never_grow() -> None:
    draft, batch, head = random_case(11, [24, 24, 20])
    batch.loss_mask.fill_(value=True)
    for parameter in draft.parameters():
        parameter.data *= 0  # then every logit is equal, and the draft is right by chance
    draft.lm_head.weight.data[0, :] = 0
    outcome = ttt_step(draft, batch, head[draft.t2d], TttConfig())
    assert (outcome.step_prefix.diff() <= 0).all()
    assert outcome.step_prefix[0] == outcome.step_correct[0] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it compiles
@needs.CXX.mark()
@pytest.mark.parametrize("objective", ["cross_entropy", "lk_alpha", "lk_hybrid"])
def test_the_compiled_loss_is_the_eager_one(objective: str) -> None:
    draft, batch, head = random_case(5, [20, 13])
    batch.loss_mask.fill_(value=True)
    losses, gradients = [], []
    for compiled in (False, True):
        options = TttConfig(objective=objective, compile=compiled)  # type: ignore[arg-type]
        outcome = ttt_step(draft, batch, head[draft.t2d], options)
        outcome.loss.backward()
        losses.append(outcome.loss.item())
        gradients.append(draft.fc.weight.grad.clone())
        draft.zero_grad(set_to_none=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9)
