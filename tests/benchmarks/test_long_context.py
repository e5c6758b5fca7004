"""The benchmark of long samples: the same step, over one sample."""

import pytest
import torch

from benchmarks.eyas_step import Variant, load, new_draft, options, packed_batch
from benchmarks.long_context import long_case, measure, parse, variants
from benchmarks.step_case import draft_rows_of_target_head
from eagle_core.training.ttt import ttt_step


def test_the_answer_is_the_last_quarter() -> None:
    case = long_case(64, shape="tiny", ttt_length=3, dtype="float32")
    assert case.lengths == (64,)
    assert case.loss_mask == (False,) * 48 + (True,) * 16


def test_variants_are_settings_of_the_step() -> None:
    assert Variant.parse("") == Variant()
    assert Variant.parse("compile") == Variant(compiled=True)
    assert Variant.parse("window=8,positions=4") == Variant(window=8, positions=4)
    case = long_case(64, shape="tiny", ttt_length=3, dtype="float32")
    losses = {}
    for text in variants(8, 4).values():
        loss = load(case, text).prepare(case)()
        losses[text] = loss.item()
    assert len(set(losses.values())) == 3
    variant = Variant.parse("window=8")
    expected = ttt_step(
        new_draft(case.shape, window=8),
        packed_batch(case),
        draft_rows_of_target_head(case.shape),
        options(case, variant),
    )
    assert losses["window=8"] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_a_case_is_measured_in_a_process_or_says_why_not() -> None:
    arguments = parse(["--shape", "tiny", "--rounds", "2", "--threads", "1"])
    case = long_case(256, shape="tiny", ttt_length=2, dtype="float32")
    result = measure(case, "window of 16", "window=16", arguments)
    assert len(result.turns) == 2
    assert all(torch.isfinite(torch.tensor(turn.loss)) for turn in result.turns)
    assert result.row().startswith("| 256 | window of 16 | 2 |")
    small = parse(["--memory-gib", "0.001", "--threads", "1"])
    failed = measure(case, "all before", "", small)
    assert failed.turns == []
    assert failed.failure in failed.row()
    assert failed.failure
