"""Sizes of aux channels, and the gain of the target's final norm, from states alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eagle_core.closed_form.state_sizes import measure_state_sizes
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import ONE_PROCESS
from eagle_core.training.packing import PackedBatch, pack
from eagle_core.training.pieces import Windows, piece_batches
from eagle_core.training.ttt import batch_positions
from tests.eagle_core.closed_form.linear_source import (
    CHANNEL_SIZES,
    GAIN,
    HIDDEN_SIZE,
    LinearSource,
    small_draft,
)

OPTIONS = TttConfig(ttt_length=3)


def batch(source: LinearSource | None = None) -> PackedBatch:
    source = source or LinearSource()
    return pack([source.fetch(index) for index in range(len(source.lengths))])


def test_the_gain_of_the_final_norm_is_found() -> None:
    sizes = measure_state_sizes(small_draft(), [batch()], OPTIONS, ONE_PROCESS)
    torch.testing.assert_close(sizes.final_gain, GAIN, rtol=0.05, atol=0)


def test_states_that_a_store_omits_do_not_count() -> None:
    whole = batch()
    last = whole.last_hidden_state.clone()
    last[torch.tensor(whole.starts[:-1])] = 0  # of the first token of each sample nothing is learnt
    kept, omitted = (
        measure_state_sizes(
            small_draft(), [replace(whole, last_hidden_state=states)], OPTIONS, ONE_PROCESS
        )
        for states in (whole.last_hidden_state, last)
    )
    assert torch.equal(kept.final_gain, omitted.final_gain)


def test_context_of_pieces_does_not_count_twice() -> None:
    source, windows = LinearSource(), Windows(tokens=20, before=6, after=4)
    samples = [source.fetch(index) for index in range(len(source.lengths))]
    pieces = list(piece_batches(samples, windows))
    assert len(pieces) > len(samples)
    for piece in pieces:
        piece.aux_hidden_states[~piece.is_own()] *= 1000
    found = measure_state_sizes(small_draft(), pieces, OPTIONS, ONE_PROCESS)
    expected = measure_state_sizes(small_draft(), [batch()], OPTIONS, ONE_PROCESS)
    assert torch.equal(found.aux_scale, expected.aux_scale)
    torch.testing.assert_close(found.final_gain, expected.final_gain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("what", ["silent", "not finite"])
def test_states_of_which_nothing_can_be_solved_still_have_sizes(what: str) -> None:
    whole = batch()
    last, aux = whole.last_hidden_state.clone(), whole.aux_hidden_states.clone()
    mask = whole.loss_mask.clone()
    if what == "silent":
        mask[:] = False
    else:
        last[:, 3] = aux[:, 3] = float("nan")
    changed = replace(whole, last_hidden_state=last, aux_hidden_states=aux, loss_mask=mask)
    sizes = measure_state_sizes(small_draft(), [changed], OPTIONS, ONE_PROCESS)
    assert torch.equal(sizes.final_gain, torch.ones(HIDDEN_SIZE))
    assert torch.isfinite(sizes.aux_scale).all()
    assert len(sizes.aux_scale.unique()) > 5


def test_where_no_gain_fits_a_channels_size_takes_its_place() -> None:
    whole = batch()
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(whole.num_tokens, 1, generator=generator) * 10  # no norm at all
    last = (whole.last_hidden_state * factors).bfloat16()
    sizes = measure_state_sizes(
        small_draft(), [replace(whole, last_hidden_state=last)], OPTIONS, ONE_PROCESS
    )
    read = batch_positions(small_draft().t2d, whole, OPTIONS).counted[0].nonzero().squeeze(1) + 1
    expected = last[read].float().square().mean(dim=0).sqrt()
    torch.testing.assert_close(sizes.final_gain, expected, rtol=1e-3, atol=0)


def test_aux_channels_have_the_nearest_powers_of_two() -> None:
    whole = batch()
    sizes = measure_state_sizes(small_draft(), [whole], OPTIONS, ONE_PROCESS)
    exponents = sizes.aux_scale.log2()
    assert torch.equal(exponents, exponents.round())
    actual = whole.aux_hidden_states.float().square().mean(dim=0).sqrt()
    ratios = (actual / sizes.aux_scale).log2()
    assert float(ratios.abs().max()) <= 0.5 + 1e-3
    assert float(CHANNEL_SIZES.max() / CHANNEL_SIZES.min()) > 1e4  # they do differ


def test_a_channel_that_is_always_zero_has_the_scale_1() -> None:
    whole = batch()
    aux = whole.aux_hidden_states.clone()
    aux[:, 7] = 0
    sizes = measure_state_sizes(
        small_draft(), [replace(whole, aux_hidden_states=aux)], OPTIONS, ONE_PROCESS
    )
    assert sizes.aux_scale[7] == 1


def test_with_fc_norm_the_normed_states_are_measured() -> None:
    sizes = measure_state_sizes(small_draft(fc_norm=True), [batch()], OPTIONS, ONE_PROCESS)
    normed = small_draft(fc_norm=True).fusing_inputs(batch().aux_hidden_states.float())
    expected = normed.square().mean(dim=0).sqrt().log2()
    assert np.abs((sizes.aux_scale.log2() - expected).detach().numpy()).max() <= 0.5 + 1e-3
    assert len(sizes.final_gain) == HIDDEN_SIZE
