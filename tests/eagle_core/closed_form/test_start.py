"""First weights that are solved agree with the target before any training, or are refused."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from eagle_core.closed_form.feed_forward import solve_feed_forward
from eagle_core.closed_form.layer import Channels, write_recurrence
from eagle_core.closed_form.predictions import Predictions
from eagle_core.closed_form.recurrence import fit_recurrence
from eagle_core.closed_form.start import SolvedStart, Step, solve_start, tokens_needed
from eagle_core.closed_form.state_sizes import measure_state_sizes
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import ONE_PROCESS
from eagle_core.training.packing import PackedBatch, pack
from eagle_core.training.ttt import TttOutcome, ttt_step
from eagle_core.training.validation import measure
from tests.eagle_core.closed_form.linear_source import (
    GAIN,
    HEAD,
    VOCAB_SIZE,
    LinearSource,
    small_draft,
)

OPTIONS = TttConfig(ttt_length=4)


def batches(source: LinearSource) -> list[PackedBatch]:
    count = len(source.lengths)
    return [
        pack([source.fetch(index) for index in range(first, min(first + 20, count))])
        for first in range(0, count, 20)
    ]


TRAIN, HELD_OUT = batches(LinearSource()), batches(LinearSource(num_samples=30, seed=1))


def step_of(draft: DraftModel, options: TttConfig, dtype: torch.dtype = torch.float32) -> Step:
    def step(batch: PackedBatch, head: torch.Tensor) -> TttOutcome:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return ttt_step(draft, batch, head.to(dtype), options)

    return step


def solve(
    draft: DraftModel,
    train: Sequence[PackedBatch] = TRAIN,
    options: TttConfig = OPTIONS,
    held_out: Sequence[PackedBatch] = HELD_OUT,
) -> SolvedStart:
    sizes = measure_state_sizes(draft, train, OPTIONS, ONE_PROCESS)
    draft.aux_scale.copy_(sizes.aux_scale)
    head = HEAD[draft.t2d]
    step = step_of(draft, options)
    return solve_start(draft, train, lambda: held_out, sizes, head, step, options, ONE_PROCESS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_output": True}, {"fc_norm": True}, {"fc_norm": True, "norm_output": True}],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (2, 1)])
def test_a_solved_draft_agrees_with_the_target_at_every_step(
    heads: int, kv_heads: int, settings: Mapping[str, bool]
) -> None:
    draft = small_draft(heads=heads, kv_heads=kv_heads, **settings)
    found = solve(draft)
    assert found.figures is not None
    assert min(found.figures.accuracies) > 0.5  # of 60 tokens, 50 of which the draft knows
    assert found.figures.length > 2.2
    rounded = measure(step_of(draft, OPTIONS, torch.bfloat16), HELD_OUT, HEAD[draft.t2d])
    assert rounded.length > found.figures.length - 0.15


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: list[dict[str, Any]] = [
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 2, "norm_output": True},
    {"attention_bias": True, "mlp_bias": True},
    {"norm_before_fc": True},
    {"sliding_window": 1},
    {"sliding_window": 6},
    {"rope_scaling": YARN},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"target_head": True, "draft_vocab_size": VOCAB_SIZE},
    {
        "num_hidden_layers": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "fc_norm": True,
        "norm_before_fc": True,
        "sliding_window": 6,
        "rope_scaling": YARN,
        "target_head": True,
        "draft_vocab_size": VOCAB_SIZE,
    },
]


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_variants_for_which_the_recurrence_holds_are_solved(variant: dict[str, Any]) -> None:
    plain = small_draft(
        fc_norm=variant.get("fc_norm", False),
        norm_output=variant.get("norm_output", False),
        draft_vocab_size=variant.get("draft_vocab_size", 50),
    )
    expected = solve(plain).figures
    assert expected is not None
    draft = small_draft(**variant)
    head = draft.lm_head.weight.clone()
    found = solve(draft)
    assert found.refused == ""
    assert found.figures is not None
    # The one norm of states of very different channels takes with it how large the others are.
    lost = 0.8 if variant.get("norm_before_fc") else 0.1
    assert min(found.figures.accuracies) > 0.6 - lost / 2
    assert found.figures.length > expected.length - lost
    assert torch.equal(draft.lm_head.weight, head) == bool(variant.get("target_head"))
    ttt_step(draft, TRAIN[0], HEAD[draft.t2d], OPTIONS).loss.backward()
    for name, parameter in draft.named_parameters():
        is_behind_zeros = name.startswith("layers.") and not name.endswith(
            ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
        )
        if parameter.requires_grad and not is_behind_zeros:
            assert parameter.grad is not None
            is_idle = name.endswith("k_proj.bias")  # alike for all keys: it changes no softmax
            if variant.get("sliding_window") == 1:  # with a single key to see, no score matters
                is_idle |= "q_proj" in name or "k_proj" in name or "hidden_norm" in name
            assert parameter.grad.any() or is_idle, name


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"qk_norm": True}, r"draft\.qk_norm norms the queries"),
        ({"norm_before_residual": True}, r"draft\.norm_before_residual norms the state"),
        ({"hidden_size": 24}, r"draft\.hidden_size is 24.*the target's 32"),
        (
            {"target_head": True, "norm_output": True, "draft_vocab_size": VOCAB_SIZE},
            r"draft\.target_head is frozen",
        ),
    ],
)
def test_other_variants_stay_as_drawn_and_say_why(variant: dict[str, Any], reason: str) -> None:
    draft = small_draft(**variant)
    found = solve(draft)
    assert re.search(reason, found.refused)
    assert found.figures is None
    fresh = small_draft(**variant).state_dict()
    del fresh["aux_scale"]
    own = draft.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in fresh.items())


@pytest.mark.parametrize("settings", [{}, {"norm_output": True}])
@pytest.mark.parametrize("size", [0.1, 30])
def test_the_size_of_the_targets_gain_does_not_matter(
    size: float, settings: Mapping[str, bool]
) -> None:
    gain = GAIN * size
    train = batches(LinearSource(gain=gain))
    held_out = batches(LinearSource(num_samples=30, seed=1, gain=gain))
    found = solve(small_draft(**settings), train, held_out=held_out)
    assert found.figures is not None
    assert min(found.figures.accuracies) > 0.5


def test_its_figures_are_those_of_the_draft() -> None:
    draft = small_draft()
    found = solve(draft)
    head = HEAD[draft.t2d]
    again = measure(step_of(draft, OPTIONS), HELD_OUT, head)
    assert again == found.figures


def test_the_same_states_give_the_same_weights() -> None:
    first, second = small_draft(), small_draft()
    solve(first)
    solve(second)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_every_parameter_can_still_be_trained() -> None:
    draft = small_draft()
    solve(draft)
    ttt_step(draft, TRAIN[0], HEAD[draft.t2d], OPTIONS).loss.backward()
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.any(), name


def test_solving_the_feed_forward_block_lowers_the_loss() -> None:
    draft = small_draft()
    sizes = measure_state_sizes(draft, TRAIN, OPTIONS, ONE_PROCESS)
    draft.aux_scale.copy_(sizes.aux_scale)
    channels = Channels.of(draft, sizes.final_gain)

    def rows_of(batch: PackedBatch) -> Predictions:
        return Predictions.of(draft, batch, sizes, OPTIONS)

    @torch.no_grad()
    def loss() -> float:
        head = HEAD[draft.t2d]
        return sum(float(ttt_step(draft, batch, head, OPTIONS).loss) for batch in HELD_OUT)

    found = fit_recurrence([rows_of(batch) for batch in TRAIN], draft, ONE_PROCESS)
    write_recurrence(draft, found, gain=sizes.final_gain, channels=channels)
    before = loss()
    solve_feed_forward(draft, TRAIN, rows_of, OPTIONS, ONE_PROCESS, channels=channels)
    assert loss() < before
    units = draft.midlayer.mlp.up_proj.weight.abs().sum(dim=1)
    assert (units > 0).all()


def drawn_again(draft: DraftModel) -> bool:
    """Return whether all weights are as they were drawn."""
    fresh = small_draft().state_dict()
    return all(
        torch.equal(weight, fresh[name])
        for name, weight in draft.state_dict().items()
        if name != "aux_scale"
    )


def test_a_solution_that_is_no_better_than_one_token_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [
        replace(
            batch,
            last_hidden_state=torch.randn(batch.last_hidden_state.shape, generator=generator),
            target_argmax=torch.full_like(batch.target_argmax, 40),
        )
        for batch in TRAIN
    ]
    draft = small_draft()
    found = solve(draft, noise, held_out=noise)
    assert "always proposes the same token at 100.0%" in found.refused
    assert drawn_again(draft)


def test_a_token_that_the_draft_cannot_propose_is_no_measure() -> None:
    """Here the target mostly says one that is not in the draft's vocabulary."""
    draft = small_draft()
    outside = int((~draft.t2d).nonzero()[0])

    def mostly(batch: PackedBatch) -> PackedBatch:
        is_kept = torch.arange(batch.num_tokens) % 3 == 0
        return replace(batch, target_argmax=torch.where(is_kept, batch.target_argmax, outside))

    held_out = [mostly(batch) for batch in HELD_OUT]
    found = solve(draft, [mostly(batch) for batch in TRAIN], held_out=held_out)
    assert found.refused == ""
    assert found.figures is not None
    assert 0.1 < found.figures.accuracies[0] < 0.4


def test_states_that_are_not_finite_are_refused() -> None:
    aux = TRAIN[0].aux_hidden_states.clone()
    aux[30, 2] = float("nan")
    draft = small_draft()
    found = solve(draft, [replace(TRAIN[0], aux_hidden_states=aux), *TRAIN[1:]])
    assert "not finite" in found.refused
    assert drawn_again(draft)


def test_answers_of_which_nothing_counts_are_refused() -> None:
    silent = [replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)) for batch in TRAIN]
    draft = small_draft()
    assert "no position" in solve(draft, silent).refused
    assert drawn_again(draft)


@pytest.mark.parametrize("case", ["one step", "answers of one token"])
def test_without_later_steps_nothing_is_made_of_rounding(case: str) -> None:
    options = TttConfig(ttt_length=1) if case == "one step" else OPTIONS
    train, held_out = TRAIN, HELD_OUT
    if case != "one step":
        short = LinearSource(num_samples=2000, longest=3), LinearSource(num_samples=99, longest=3)
        train, held_out = map(batches, short)
    draft = small_draft()
    found = solve(draft, train, options, held_out)
    assert found.figures is not None
    assert found.figures.accuracies[0] > 0.45
    largest = max(float(part.detach().abs().max()) for part in draft.parameters())
    assert largest < 1e4
    rounded = measure(step_of(draft, options, torch.bfloat16), held_out, HEAD[draft.t2d])
    assert rounded.accuracies[0] > found.figures.accuracies[0] - 0.05


def test_a_draft_that_is_too_small_is_refused() -> None:
    draft = small_draft(intermediate_size=2)
    assert "too small" in solve(draft).refused


def test_weights_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = small_draft()

    def broken(found: DraftModel, *_: object) -> None:
        found.midlayer.mlp.down_proj.weight[0, 0] = float("inf")

    monkeypatch.setattr("eagle_core.closed_form.start._solve", broken)
    assert "not finite" in solve(draft).refused
    assert drawn_again(draft)


def test_larger_drafts_need_more_tokens() -> None:
    assert tokens_needed(small_draft()) == 40 * 4 * 32
