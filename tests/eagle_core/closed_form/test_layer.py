"""The network computes the recurrence that is written into it."""

from dataclasses import replace

import pytest
import torch

from eagle_core.closed_form.layer import Channels, write_recurrence
from eagle_core.closed_form.predictions import Predictions
from eagle_core.closed_form.recurrence import Recurrence, fit_recurrence
from eagle_core.closed_form.state_sizes import measure_state_sizes
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.distributed import ONE_PROCESS
from eagle_core.training.packing import PackedBatch, pack
from eagle_core.training.ttt import batch_plan, chain_states
from tests.eagle_core.closed_form.linear_source import (
    HIDDEN_SIZE,
    LinearSource,
    random_matrix,
    small_draft,
)

OPTIONS = TttConfig(ttt_length=4)


def all_samples(source: LinearSource) -> PackedBatch:
    return pack([source.fetch(index) for index in range(len(source.lengths))])


def low_rank(seed: int, columns: int) -> torch.Tensor:
    """Return a map into a few directions, the same for all maps: heads and stream hold no more."""
    narrow = random_matrix(100, HIDDEN_SIZE, 8) @ random_matrix(seed, 8, columns)
    return narrow.double()


def recurrence(constant: torch.Tensor) -> Recurrence:
    """Return maps of few directions."""
    identity = torch.eye(HIDDEN_SIZE, dtype=torch.float64)
    states = low_rank(6, HIDDEN_SIZE)
    return Recurrence(
        fusing=low_rank(1, len(constant)),
        first_embedding=low_rank(2, HIDDEN_SIZE)[:, :6] @ low_rank(3, HIDDEN_SIZE)[:6],
        carry=low_rank(4, HIDDEN_SIZE),
        later_embedding=low_rank(5, HIDDEN_SIZE)[:, :6] @ low_rank(3, HIDDEN_SIZE)[:6],
        constant=constant,
        embedding_moments=identity,
        num_embeddings=1,
        state_moments=states @ states.T,
    )


def written(
    draft: DraftModel, batch: PackedBatch
) -> tuple[Channels, list[torch.Tensor], list[torch.Tensor]]:
    """Write a recurrence into `draft`; return what it and the network predict in each step."""
    sizes = measure_state_sizes(draft, [batch], OPTIONS, ONE_PROCESS)
    draft.aux_scale.copy_(sizes.aux_scale)
    gain = sizes.final_gain
    rows = Predictions.of(draft, batch, sizes, OPTIONS)
    fitted = fit_recurrence([rows], draft, ONE_PROCESS)
    found = recurrence(fitted.constant)
    channels = Channels.of(draft, gain)
    write_recurrence(draft, found, gain=gain, channels=channels)
    with torch.no_grad():
        plan = batch_plan(draft.t2d, batch, OPTIONS)
        network = list(chain_states(draft, batch, plan, OPTIONS))
    without = replace(  # what the network does not hold is not carried
        found,
        fusing=channels.without(found.fusing),
        first_embedding=channels.without(found.first_embedding),
        carry=channels.without(found.carry),
        later_embedding=channels.without(found.later_embedding),
    )
    return channels, list(without.predictions(rows)), network


@pytest.mark.parametrize("settings", [{}, {"norm_output": True}, {"fc_norm": True}])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (2, 1)])
def test_the_network_computes_the_recurrence(
    heads: int, kv_heads: int, settings: dict[str, bool]
) -> None:
    draft = small_draft(heads=heads, kv_heads=kv_heads, **settings)
    channels, linear, network = written(draft, all_samples(LinearSource()))
    is_kept = torch.ones(HIDDEN_SIZE, dtype=torch.bool)
    is_kept[[channels.constant, channels.flag]] = False
    for expected, actual in zip(linear, network, strict=True):
        error = (actual - expected)[:, is_kept]
        assert float(error.norm() / expected[:, is_kept].norm()) < 0.15


def test_the_constant_stays_and_the_flag_is_cleared() -> None:
    channels, _, network = written(small_draft(), all_samples(LinearSource()))
    for state in network:
        constant, flag = state[:, channels.constant], state[:, channels.flag]
        others = state.square().sum(dim=1) - constant.square() - flag.square()
        assert (constant.square() > 10 * others).all()
        assert (flag.abs() < 0.1 * constant.abs()).all()


def test_heads_see_their_own_position_only() -> None:
    draft = small_draft()
    batch = all_samples(LinearSource(num_samples=60))
    written(draft, batch)
    first = slice(batch.starts[0], batch.starts[1])
    ids, aux = batch.input_ids[first], batch.aux_hidden_states[first].float()
    with torch.no_grad():
        hidden = draft.fuse(aux)[:-1].unsqueeze(0)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)

        def decoded(ids: torch.Tensor) -> torch.Tensor:
            return draft.decode(ids[1:].unsqueeze(0), hidden, positions, DraftCache())[0]

        changed = ids.clone()
        changed[2] = (changed[2] + 7) % draft.config.vocab_size
        differs = (decoded(ids) - decoded(changed)).norm(dim=1)
    assert differs[1] > 0.5  # index 1 reads token 2
    assert float(torch.cat([differs[:1], differs[2:]]).max()) < 1e-3


def test_the_channels_are_those_that_the_head_reads_least() -> None:
    draft = small_draft()
    gain = torch.ones(HIDDEN_SIZE)
    with torch.no_grad():
        draft.lm_head.weight[:, [5, 9]] *= 0.01
        draft.lm_head.weight[:, 9] *= 0.01
    assert Channels.of(draft, gain) == Channels(constant=9, flag=5)
    gain[3] = 1e-9
    assert Channels.of(draft, gain) == Channels(constant=3, flag=9)
