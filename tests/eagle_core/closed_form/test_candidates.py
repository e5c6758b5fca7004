"""The comparison finds the layers that tell, and counts as a person would by hand."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.closed_form.candidates import (
    MOST_MEASURED,
    Comparison,
    candidate_layers,
    compare_candidates,
)
from eagle_core.closed_form.moments import RIDGE, Moments
from eagle_core.closed_form.state_rows import FeatureMap, StateRows
from eagle_core.closed_form.state_sizes import add_norms, final_gain
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample
from eagle_core.training.config import TttConfig
from eagle_core.training.packing import pack
from eagle_core.training.ttt import batch_positions
from tests.eagle_core.closed_form.layered_samples import (
    EMBEDDING,
    HEAD,
    HIDDEN_SIZE,
    LAYERS,
    TELLING,
    VOCAB_SIZE,
    samples,
)
from tests.eagle_core.pretend_device import pretend_device

CPU = torch.device("cpu")
COUNTS = np.arange(VOCAB_SIZE, dtype=np.int64)


def vocabulary(size: int) -> DraftVocabulary:
    return DraftVocabulary.build(COUNTS, size=size)


def rows(given: list[HiddenStateSample]) -> StateRows:
    found = StateRows.of(given)
    assert found is not None
    return found


def compare(
    train: list[HiddenStateSample], held_out: list[HiddenStateSample], **changes: Any
) -> Comparison:
    settings: dict[str, Any] = {
        "layers": LAYERS,
        "configured": (1, 3, 9),
        "embedding": EMBEDDING,
        "head": HEAD,
        "vocabulary": vocabulary(50),
        "vocabularies": [],
        "held_out_counts": COUNTS,
        "device": CPU,
    }
    return compare_candidates(rows(train), rows(held_out), **{**settings, **changes})


def accuracies(found: Comparison) -> dict[tuple[int, int, int], float]:
    return {result.layers: result.accuracy for result in found.triples}


@pytest.fixture(scope="module")
def train() -> list[HiddenStateSample]:
    return samples(120)


@pytest.fixture(scope="module")
def held_out() -> list[HiddenStateSample]:
    return samples(30, seed=1)


def test_triples_with_the_layers_that_tell_win(
    train: list[HiddenStateSample], held_out: list[HiddenStateSample]
) -> None:
    found = compare(train, held_out, others=[(1, 5, 9)])
    assert found.num_triples == 10
    assert found.num_conversations == 30
    with_both = {triple for triple in combinations(LAYERS, 3) if set(TELLING) <= set(triple)}
    assert {result.layers for result in found.triples[:3]} == with_both
    assert found.triples[2].accuracy > found.triples[3].accuracy + 0.2
    assert found.triples[-1].layers == (1, 5, 9)  # neither of them
    ordered = [result.accuracy for result in found.triples]
    assert ordered == sorted(ordered, reverse=True)


def test_accuracy_is_that_of_a_ridge_regression_by_hand(
    train: list[HiddenStateSample], held_out: list[HiddenStateSample]
) -> None:
    found = compare(train, held_out)
    norms = Moments(HIDDEN_SIZE, 1, CPU)
    add_norms(norms, rows(train).final)
    gain = final_gain(norms)
    ids = torch.from_numpy(vocabulary(50).target_ids)
    hits = {}
    for triple in combinations(LAYERS, 3):
        x, y, _ = by_hand(train, triple)
        damping = (RIDGE * x.shape[1] / len(x) * x.square().sum(dim=0)).sqrt()
        weights = torch.linalg.lstsq(
            torch.cat([x, torch.diag(damping)]),
            torch.cat([y / gain, torch.zeros(x.shape[1], HIDDEN_SIZE)]),
        ).solution
        features, _, argmax = by_hand(held_out, triple)
        logits = (features @ weights * gain) @ HEAD[ids].double().T
        hits[triple] = ids[logits.argmax(dim=1)] == argmax
    assert accuracies(found) == pytest.approx(
        {t: float(h.double().mean()) for t, h in hits.items()}
    )
    reference = float(hits[1, 3, 9].double().mean())
    for result in found.triples:
        assert result.difference == pytest.approx(result.accuracy - reference)


def by_hand(
    given: list[HiddenStateSample], triple: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, final states and the target's choice, one position after the other."""
    features, finals, argmax = [], [], []
    for sample in given:
        aux = from_bfloat16_bits(sample.aux_hidden_states, dtype=torch.float64)
        last = from_bfloat16_bits(sample.last_hidden_state, dtype=torch.float64)
        for position in range(len(sample) - 2):
            if not sample.loss_mask[position + 2]:
                continue
            embedded = EMBEDDING[sample.input_ids[position + 1]].double()
            states = [aux[position, LAYERS.index(layer)] for layer in triple]
            features.append(torch.cat([*states, rms_norm(embedded, (HIDDEN_SIZE,))]))
            finals.append(last[position + 1])
            argmax.append(int(sample.target_argmax[position + 1]))
    return torch.stack(features), torch.stack(finals), torch.tensor(argmax)


def test_the_positions_are_those_of_step_0_in_training(held_out: list[HiddenStateSample]) -> None:
    batch = pack(held_out)
    options = TttConfig(ttt_length=1, loss_positions="predicted")
    at = batch_positions(torch.ones(VOCAB_SIZE, dtype=torch.bool), batch, options).supervised[0]
    at = at.nonzero().squeeze(1)
    found = rows(held_out)
    assert torch.equal(found.aux.flatten(1), batch.aux_hidden_states[at])
    assert torch.equal(found.next_ids, batch.input_ids[at + 1])
    assert torch.equal(found.final, batch.last_hidden_state[at + 1])
    assert torch.equal(found.argmax, batch.target_argmax[at + 1])


def test_the_order_of_conversations_does_not_matter(
    train: list[HiddenStateSample], held_out: list[HiddenStateSample]
) -> None:
    found, turned = compare(train, held_out), compare(train[::-1], held_out[::-1])
    for one, other in zip(found.triples, turned.triples, strict=True):
        assert one.layers == other.layers
        assert one.accuracy == other.accuracy
        assert one.margin == pytest.approx(other.margin)


def test_the_interval_is_that_of_drawing_conversations(
    train: list[HiddenStateSample], held_out: list[HiddenStateSample]
) -> None:
    configured, better = (1, 3, 9), (1, 3, 7)
    found = {result.layers: result for result in compare(train, held_out).triples}
    margin = found[better].margin
    assert found[configured].margin == 0
    counts = np.array([np.sum(sample.loss_mask[2:]) for sample in held_out])
    gained = np.zeros(len(held_out))
    for number, sample in enumerate(held_out):
        alone = accuracies(compare(train, [sample] * 80))
        gained[number] = counts[number] * (alone[better] - alone[configured])
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(counts), (4000, len(counts)))
    differences = gained[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    assert margin == pytest.approx(1.96 * differences.std(), rel=0.1)
    deviations = gained - counts * gained.sum() / counts.sum()
    expected = 1.96 * (30 / 29 * np.square(deviations).sum()) ** 0.5 / counts.sum()
    assert margin == pytest.approx(expected)


def test_a_single_conversation_has_no_interval(train: list[HiddenStateSample]) -> None:
    sample = samples(1, seed=2)[0]
    times = 20
    longer = replace(
        sample,
        input_ids=np.tile(sample.input_ids, times),
        loss_mask=np.tile(sample.loss_mask, times),
        aux_hidden_states=np.tile(sample.aux_hidden_states, (times, 1, 1)),
        last_hidden_state=np.tile(sample.last_hidden_state, (times, 1)),
        target_argmax=np.tile(sample.target_argmax, times),
    )
    found = compare(train, [longer])
    assert {result.margin for result in found.triples} == {None}


def test_vocabularies_cover_what_they_hold_and_miss_the_rest(
    train: list[HiddenStateSample], held_out: list[HiddenStateSample]
) -> None:
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    counts[[0, 30, 59]] = 5, 3, 2
    sizes = (10, 40, VOCAB_SIZE)
    found = compare(
        train,
        held_out,
        configured=(1, 3, 7),
        vocabularies=[vocabulary(size) for size in sizes],
        held_out_counts=counts,
    )
    assert [one.size for one in found.vocabularies] == list(sizes)
    assert [one.coverage for one in found.vocabularies] == [0.2, 0.5, 1.0]  # the highest ids
    argmax = rows(held_out).argmax
    for one in found.vocabularies:
        possible = float((argmax >= VOCAB_SIZE - one.size).float().mean())
        assert possible - 0.25 < one.accuracy <= possible
    full = compare(train, held_out, configured=(1, 3, 7), vocabulary=vocabulary(VOCAB_SIZE))
    assert found.vocabularies[-1].accuracy == accuracies(full)[1, 3, 7]


def test_directions_that_hold_all_that_a_layer_says_lose_nothing() -> None:
    train, held_out = samples(120, rank=5), samples(30, seed=1, rank=5)
    whole = compare(train, held_out)
    reduced = compare(train, held_out, most_features=HIDDEN_SIZE - 1)
    assert (whole.features_per_layer, reduced.features_per_layer) == (16, 15)
    for triple, accuracy in accuracies(whole).items():
        assert accuracies(reduced)[triple] == pytest.approx(accuracy, abs=0.1)
    few = compare(train, held_out, most_features=2)
    assert few.triples[0].accuracy < reduced.triples[0].accuracy - 0.1
    best = {result.layers for result in few.triples[:3]}
    assert best == {result.layers for result in whole.triples[:3]}


@pytest.fixture(scope="module")
def six_layers() -> tuple[list[HiddenStateSample], list[HiddenStateSample]]:
    """Samples to solve and to measure on; the states of the last layer are those of the first."""
    order = [0, 1, 2, 3, 4, 0]
    found = [
        replace(sample, aux_hidden_states=sample.aux_hidden_states[:, order])
        for sample in samples(100)
    ]
    return found[:80], found[80:]


def test_only_the_best_and_those_asked_for_are_measured(
    six_layers: tuple[list[HiddenStateSample], list[HiddenStateSample]],
) -> None:
    solved: list[int] = []
    found = compare(
        *six_layers,
        layers=tuple(range(6)),
        configured=(0, 2, 4),
        others=[(0, 4, 5)],
        on_solved=lambda: solved.append(1),
    )
    assert found.num_triples == len(solved) == 20
    measured = {result.layers for result in found.triples}
    assert {(0, 2, 4), (0, 4, 5), (0, 1, 3), (1, 3, 5)} <= measured
    assert len(measured) <= MOST_MEASURED + 2


def test_the_smallest_vocabulary_ranks(
    six_layers: tuple[list[HiddenStateSample], list[HiddenStateSample]],
) -> None:
    few = {"vocabulary": vocabulary(8)}
    alone, ranked, unranked = (
        set(accuracies(compare(*six_layers, layers=tuple(range(6)), configured=(0, 1, 3), **given)))
        for given in (few, {"vocabularies": [vocabulary(8)]}, {})
    )
    assert ranked == alone
    assert unranked != alone


def test_directions_do_not_depend_on_the_sizes_of_channels(
    train: list[HiddenStateSample],
) -> None:
    found = rows(train)
    powers = torch.exp2(torch.arange(HIDDEN_SIZE) % 7 - 3.0).bfloat16()
    resized = replace(found, aux=found.aux * powers)
    features = FeatureMap(found, EMBEDDING, CPU, most=4)(found)
    assert features.shape == (len(found), 4 * (len(LAYERS) + 1))
    others = FeatureMap(resized, EMBEDDING, CPU, most=4)(resized)
    torch.testing.assert_close(features.abs(), others.abs(), rtol=1e-2, atol=1e-2)


def test_a_channel_that_is_always_zero_has_no_direction(train: list[HiddenStateSample]) -> None:
    found = rows(train)
    found.aux[..., 3] = 0
    features = FeatureMap(found, EMBEDDING, CPU, most=HIDDEN_SIZE - 1)(found)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize(
    ("num_train", "num_held_out", "what"), [(3, 30, "training"), (30, 3, "held-out")]
)
def test_too_few_positions_are_refused(num_train: int, num_held_out: int, what: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"on \d+ supervised {what} positions.*max_conversations"
    ):
        compare(samples(num_train), samples(num_held_out, seed=1))


@pytest.mark.parametrize("most_features", [HIDDEN_SIZE, 6])
def test_another_device_gives_the_same(
    train: list[HiddenStateSample], held_out: list[HiddenStateSample], most_features: int
) -> None:
    given = {"most_features": most_features, "vocabularies": [vocabulary(20)]}
    expected = compare(train, held_out, **given)
    with pretend_device() as device:
        assert compare(train, held_out, device=device, **given) == expected


def test_no_position_gives_no_rows() -> None:
    sample = samples(1)[0]
    assert StateRows.of([replace(sample, loss_mask=np.zeros(len(sample), dtype=bool))]) is None


def test_candidate_layers_of_a_model_of_30() -> None:
    assert candidate_layers(30, (1, 14, 26)) == (1, 5, 8, 11, 14, 17, 20, 23, 26, 29)


@pytest.mark.parametrize(
    ("num_layers", "required", "expected"),
    [
        (30, (1, 14, 26), 10),
        (32, (0, 1, 2, 15, 28), 10),
        (80, (1, 39, 76), 10),
        (8, (1, 3, 4), 8),
        (3, (0, 1, 2), 3),
        (1, (), 1),
    ],
)
def test_candidate_layers_are_spread_and_contain_the_required(
    num_layers: int, required: tuple[int, ...], expected: int
) -> None:
    layers = candidate_layers(num_layers, required)
    assert len(layers) == expected
    assert set(required) <= set(layers)
    assert list(layers) == sorted(set(layers))
    assert all(0 <= layer < num_layers for layer in layers)
    gaps = np.diff([-1, *layers, num_layers])
    assert gaps.max() < 3 * num_layers / expected
