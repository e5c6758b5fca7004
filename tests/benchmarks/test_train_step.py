"""The peers do the same work, and the arithmetic that is counted is the arithmetic that is done."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.eyas_step import new_draft, options, packed_batch
from benchmarks.plain_step import Attention, plain_loss
from benchmarks.published_cases import PUBLISHED, published_table
from benchmarks.sharegpt_masks import PackedMask, typical_pack
from benchmarks.step_arithmetic import needed_operations
from benchmarks.step_case import (
    SHAPES,
    Shape,
    StepCase,
    draft_ids,
    draft_rows_of_target_head,
    step_tensors,
    whole_target_head,
)
from benchmarks.step_worker import PeerFailedError, Worker
from benchmarks.train_step import cases_of, parse
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.training.ttt import ttt_step
from tests.eagle_core.pretend_device import pretend_device

PROMPT, ANSWER = (False,) * 9, (True,) * 14
CASE = StepCase(
    shape=SHAPES["tiny"],
    ttt_length=4,
    dtype="float32",
    lengths=(23, 32, 9),
    loss_mask=(*PROMPT, *ANSWER, *PROMPT, *ANSWER, *PROMPT, *PROMPT),
)


@pytest.mark.parametrize("attention", ["columns", "dense"])
def test_plain_step_has_our_loss_and_gradients(attention: Attention) -> None:
    draft = new_draft(CASE.shape)
    batch = packed_batch(CASE)
    loss, correct = plain_loss(
        draft, batch, whole_target_head(CASE.shape), options(CASE), attention
    )
    loss.backward()
    expected = {name: p.grad for name, p in draft.named_parameters() if p.requires_grad}
    draft.zero_grad(set_to_none=True)

    outcome = ttt_step(draft, batch, draft_rows_of_target_head(CASE.shape), options(CASE))
    outcome.loss.backward()

    assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert outcome.step_correct.tolist() == correct.tolist()
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("attention", ["columns", "dense"])
def test_plain_step_takes_all_tensors_along(attention: Attention) -> None:
    draft, batch, head = new_draft(CASE.shape), packed_batch(CASE), whole_target_head(CASE.shape)
    expected, _ = plain_loss(draft, batch, head, options(CASE), attention)
    with pretend_device() as device:
        draft.to(device)
        found, _ = plain_loss(draft, batch.to(device), head.to(device), options(CASE), attention)
        found.backward()
        assert found.item() == expected.item()


def test_every_choice_of_the_target_is_in_the_draft_vocabulary() -> None:
    tensors = step_tensors(CASE, draft_rows_of_target_head(CASE.shape))
    logits = tensors.last_hidden_state @ whole_target_head(CASE.shape).T
    assert logits.argmax(dim=-1).tolist() == draft_ids(CASE.shape)[tensors.draft_choice].tolist()
    assert tensors.last_hidden_state.square().mean(dim=-1) == pytest.approx(1.0, rel=1e-5)


def test_counted_operations_are_those_of_a_step_by_hand() -> None:
    shape = Shape(
        name="hand",
        hidden_size=2,
        intermediate_size=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        vocab_size=20,
        draft_vocab_size=5,
    )
    case = StepCase(
        shape=shape,
        ttt_length=2,
        dtype="float32",
        lengths=(2, 6),
        loss_mask=(True, True, False, False, False, False, True, True),
    )
    # Second sequence, tokens 2 to 7: step 0 counts at 4 and 5, step 1 at 3 and 4; step 0 computes
    # 3, 4, 5 and step 1 computes 3 and 4. Tokens 5 and 6 teach; step-0 keys of 2 to 5 are seen;
    # embeddings of 4, 5, 6 enter queries, those of 3, 4, 5, 6 enter keys and values.
    assert needed_operations(case, options(case)) == {
        "fuse": 2 * 2 * 4 * 6 * 2,
        "embeddings": 2 * 3 * (3 * 4 + 4 * 4) * 2,
        "hidden": 2 * 3 * (5 * 4 + (4 + 2) * 4) * 2,
        "output": 2 * 3 * 5 * 4 * 2,
        "MLP": 2 * 3 * 5 * 3 * 2 * 3,
        "attention": 2 * 3 * (2 + 3 + 4 + 3 + 4) * 2 * 4,
        "head": 2 * 3 * 4 * 2 * 5,
        "teacher": 2 * 2 * 2 * 5,
    }


def test_our_step_does_little_more_than_the_counted_operations() -> None:
    case = replace(CASE, lengths=(400,), loss_mask=(False,) * 60 + (True,) * 340)
    draft, batch = new_draft(case.shape), packed_batch(case)
    with FlopCounterMode(display=False) as counter:
        ttt_step(draft, batch, draft_rows_of_target_head(case.shape), options(case)).loss.backward()
    needed = sum(needed_operations(case, options(case)).values())
    assert 0.7 * counter.get_total_flops() < needed <= 1.01 * counter.get_total_flops()


def test_packs_hold_real_masks_behind_one_another() -> None:
    def sample(*flags: bool) -> TokenizedSample:
        ids = torch.arange(len(flags), dtype=torch.int32).numpy()
        mask = torch.tensor(flags).numpy()
        return TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)

    samples = [sample(*PROMPT, *ANSWER), sample(*ANSWER), sample(*PROMPT, *PROMPT, *PROMPT)]
    assert typical_pack(samples, 30) == PackedMask(
        lengths=(23, 7), loss_mask=(*PROMPT, *ANSWER, *ANSWER[:7])
    )


def _worker(case: StepCase, folder: Path, *, memory_gib: float) -> Worker:
    case.write(folder / "case.json")
    return Worker(
        [
            *(sys.executable, "-m", "benchmarks.eyas_step", str(folder / "case.json")),
            *("--threads=1", f"--memory-gib={memory_gib}"),
        ],
        log_path=folder / "log",
        environment=dict(os.environ),
    )


@pytest.mark.slow
def test_a_worker_answers_in_turn_and_is_ended_when_late(tmp_path: Path) -> None:
    with _worker(CASE, tmp_path, memory_gib=8.0) as worker:
        assert worker.ready(120).loaded_bytes > 0
        first, second = worker.turn(60), worker.turn(60)
        assert second.loss < first.loss
        assert first.cpu_seconds > 0
        assert first.step_bytes < 2**28
        with pytest.raises(PeerFailedError, match="no answer within 0 s"):
            worker.turn(0)


@pytest.mark.slow
def test_a_worker_that_needs_too_much_memory_says_so(tmp_path: Path) -> None:
    case = replace(CASE, shape=SHAPES["llama"])
    with (
        _worker(case, tmp_path, memory_gib=0.8) as worker,
        pytest.raises(PeerFailedError, match="does not fit into memory"),
    ):
        worker.ready(120)


def test_published_shapes_stand_beside_our_speed_on_them() -> None:
    small, large = (one.case(dtype="bfloat16", device="cuda") for one in PUBLISHED)
    assert (small.num_tokens, small.shape.hidden_size, small.ttt_length) == (4096, 2048, 7)
    assert (large.num_tokens, large.shape.intermediate_size) == (2944, 14336)
    assert all(small.loss_mask)
    _, _, first, *others = published_table([(small, 106_838.0), (CASE, 1.0)])
    assert first.endswith("| 53,419 | 106,838 | 2.00 |")
    assert others == []


def test_shapes_and_published_ones_are_measured_in_one_run() -> None:
    arguments = parse(["--shape", "--published", "--device", "cpu"])
    assert [case.shape.name for case in cases_of(arguments)] == [
        one.shape.name for one in PUBLISHED
    ]
    plain = parse(["--shape", "tiny", "--tokens", "64", "--ttt", "3"])
    assert [(case.shape.name, case.num_tokens) for case in cases_of(plain)] == [("tiny", 64)]
