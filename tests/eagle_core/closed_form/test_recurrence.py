"""A recurrence that made the states is found again."""

import pytest
import torch
from torch import Tensor

from eagle_core.closed_form.predictions import Predictions
from eagle_core.closed_form.recurrence import Recurrence, fit_recurrence
from eagle_core.closed_form.state_sizes import StateSizes
from eagle_core.errors import ConfigError
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import ONE_PROCESS
from eagle_core.training.packing import pack
from tests.eagle_core.closed_form.linear_source import (
    GAIN,
    HIDDEN_SIZE,
    LinearSource,
    random_matrix,
    small_draft,
)

STEPS, TOKENS = 3, 4000
DRAFT = small_draft(num_aux=HIDDEN_SIZE + 1)


def exact_rows() -> tuple[Predictions, Tensor, Tensor]:
    """Return rows of states that follow p' = M p + N e exactly, and M and N."""
    carry = 0.7 * random_matrix(0, HIDDEN_SIZE, HIDDEN_SIZE)
    embed = random_matrix(1, HIDDEN_SIZE, HIDDEN_SIZE)
    embedding = random_matrix(2, TOKENS, HIDDEN_SIZE) * HIDDEN_SIZE**0.5
    states = [torch.zeros(HIDDEN_SIZE)]
    for token in range(1, TOKENS):
        states.append(carry @ states[-1] + embed @ embedding[token])
    final = torch.stack(states)
    aux = torch.cat([final, torch.ones(TOKENS, 1)], dim=1)  # token t's own state, and a constant
    indices = torch.arange(100, TOKENS - STEPS)
    rows = Predictions(
        indices=(indices, indices[5:], indices[7:]),
        is_counted=tuple(torch.arange(len(indices) - skipped) % 5 > 0 for skipped in (0, 5, 7)),
        aux=aux,
        embedding=embedding,
        final=final,
    )
    return rows, carry, embed


def test_the_maps_that_made_the_states_are_found() -> None:
    rows, carry, embed = exact_rows()
    found = fit_recurrence([rows], DRAFT, ONE_PROCESS)
    for actual, expected in (
        (found.fusing[:, :HIDDEN_SIZE], carry),
        (found.first_embedding, embed),
        (found.carry, carry),
        (found.later_embedding, embed),
    ):
        assert float((actual - expected).norm() / expected.norm()) < 0.02
    constants = rows.aux[rows.indices[0]] @ found.constant.float()
    assert float((constants - 1).abs().max()) < 0.02
    for step, predicted in enumerate(found.predictions(rows)):
        error = predicted - rows.finals(step)
        assert float(error.norm() / rows.finals(step).norm()) < 0.03


def test_with_a_single_step_there_is_nothing_to_carry() -> None:
    rows, _, embed = exact_rows()
    one = Predictions(
        indices=rows.indices[:1],
        is_counted=rows.is_counted[:1],
        aux=rows.aux,
        embedding=rows.embedding,
        final=rows.final,
    )
    found = fit_recurrence([one], DRAFT, ONE_PROCESS)
    assert float((found.first_embedding - embed).norm() / embed.norm()) < 0.02
    assert torch.equal(found.carry, torch.eye(HIDDEN_SIZE, dtype=torch.float64))


def test_without_a_position_that_counts_it_is_refused() -> None:
    rows, _, _ = exact_rows()
    silent = Predictions(
        indices=rows.indices,
        is_counted=tuple(torch.zeros_like(counted) for counted in rows.is_counted),
        aux=rows.aux,
        embedding=rows.embedding,
        final=rows.final,
    )
    with pytest.raises(ConfigError, match="no position"):
        fit_recurrence([silent], DRAFT, ONE_PROCESS)


def test_the_rows_of_a_batch_are_where_the_step_learns() -> None:
    draft, source = small_draft(), LinearSource()
    batch = pack([source.fetch(index) for index in range(3)])
    sizes = StateSizes(aux_scale=torch.ones(3 * HIDDEN_SIZE), final_gain=GAIN)
    rows = Predictions.of(draft, batch, sizes, TttConfig(ttt_length=STEPS))
    final = batch.last_hidden_state.float() / GAIN
    first = batch.starts[1]
    for step, (indices, counted) in enumerate(zip(rows.indices, rows.is_counted, strict=True)):
        in_second = [index for index in indices.tolist() if index >= first]
        assert in_second[0] == first  # of the sample's tokens the first two are the prompt's
        assert not set(indices.tolist()) & {first - 1}  # no next token in the same sample
        tokens = indices + 1 + step
        torch.testing.assert_close(rows.finals(step), final[tokens])
        known = draft.t2d[batch.target_argmax[tokens]]
        assert known[counted].all()
        assert counted.any()
    kept = rows.indices[0][rows.kept(1)]
    assert torch.equal(kept, rows.indices[1])


def test_predictions_follow_the_maps() -> None:
    rows, _, _ = exact_rows()
    seeds = iter(range(10, 20))
    square = [random_matrix(next(seeds), HIDDEN_SIZE, HIDDEN_SIZE).double() for _ in range(3)]
    num_aux = rows.aux.shape[1]
    found = Recurrence(
        fusing=random_matrix(9, HIDDEN_SIZE, num_aux).double(),
        first_embedding=square[0],
        carry=square[1],
        later_embedding=square[2],
        constant=torch.zeros(num_aux),
        embedding_moments=torch.eye(HIDDEN_SIZE),
        num_embeddings=1,
        state_moments=torch.eye(HIDDEN_SIZE),
    )
    states = list(found.predictions(rows))
    index = int(rows.indices[2][4])
    expected = found.fusing @ rows.aux[index].double()
    expected = expected + square[0] @ rows.embedding[index + 1].double()
    for step in (1, 2):
        carried = square[1] @ expected
        expected = carried + square[2] @ rows.embedding[index + 1 + step].double()
    torch.testing.assert_close(states[2][4].double(), expected, rtol=1e-3, atol=1e-3)
