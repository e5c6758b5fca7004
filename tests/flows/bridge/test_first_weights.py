"""A run's first weights are made once, and every attempt begins with the same."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import Checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState
from flows.bridge.draft_setup import DraftSetup
from flows.bridge.first_weights import first_weights, load_first_weights, read_start
from tests.eagle_core.closed_form.linear_source import HEAD, LinearSource, small_draft

TRAINING = TrainingConfig(ttt_length=3, draft_vocab_size=50)
RANDOM = TRAINING.model_copy(update={"start": "random"})


def setup(path: Path, *, seed: int = 0) -> DraftSetup:
    return DraftSetup(run_path=path, draft=small_draft(seed=seed), target_lm_head=HEAD)


def weights(made: DraftSetup) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in made.draft.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_solved_weights_are_kept_and_read_again(tmp_path: Path) -> None:
    source, first, second = LinearSource(), setup(tmp_path), setup(tmp_path)
    held_out = LinearSource(num_samples=20, seed=1)
    found = first_weights(first, source, held_out, TRAINING)
    assert found is not None
    assert found.is_solved
    assert found.is_held_out
    assert len(found.accuracies) == 3
    assert found.scalars()["held_out/accuracy_2"] == found.accuracies[2]
    assert found.scalars()["held_out/acceptance_length"] == found.acceptance_length > 2
    source.num_fetched = 0
    assert first_weights(second, source, held_out, TRAINING) == found
    assert source.num_fetched == 0
    assert equal(weights(first), weights(second))
    third = setup(tmp_path, seed=5)
    assert load_first_weights(third)
    assert equal(weights(first), weights(third))
    assert read_start(tmp_path) == found


def test_other_settings_or_data_make_them_anew(tmp_path: Path) -> None:
    source = LinearSource()
    for training in (TRAINING, TRAINING.model_copy(update={"ttt_length": 2}), RANDOM):
        source.num_fetched = 0
        first_weights(setup(tmp_path), source, None, training)
        assert source.num_fetched > 0
    source = LinearSource(source_id="other")
    first_weights(setup(tmp_path), source, None, RANDOM)
    assert source.num_fetched > 0


@pytest.mark.parametrize("name", ["draft.safetensors", "start.json"])
def test_damaged_files_are_written_again(tmp_path: Path, name: str) -> None:
    first, second = setup(tmp_path), setup(tmp_path)
    found = first_weights(first, LinearSource(), None, TRAINING)
    path = tmp_path / "start" / name
    path.write_bytes(path.read_bytes()[:40])
    again = first_weights(second, LinearSource(), None, TRAINING)
    assert found is not None
    assert again is not None
    assert again.accuracies == found.accuracies
    assert equal(weights(first), weights(second))
    assert json.loads((tmp_path / "start" / "start.json").read_text())["start"]["seconds"]


def test_without_held_out_samples_its_own_measure_it(tmp_path: Path) -> None:
    found = first_weights(setup(tmp_path), LinearSource(), None, TRAINING)
    assert found is not None
    assert found.is_solved
    assert not found.is_held_out
    assert found.scalars() == {}


def test_drawn_weights_read_scaled_channels(tmp_path: Path) -> None:
    made = setup(tmp_path)
    drawn = made.draft.fc.weight.clone()
    found = first_weights(made, LinearSource(), None, RANDOM)
    assert found is not None
    assert (found.kind, found.is_solved, found.accuracies) == ("random", False, ())
    assert torch.equal(made.draft.fc.weight, drawn)
    assert len(made.draft.aux_scale.unique()) > 5


def test_a_given_draft_keeps_its_function(tmp_path: Path) -> None:
    made = setup(tmp_path)
    fusing = made.draft.fusing_weight().clone()
    training = TRAINING.model_copy(update={"start": "/some/draft"})
    found = first_weights(made, LinearSource(), None, training)
    assert found is not None
    assert found.kind == "/some/draft"
    assert len(made.draft.aux_scale.unique()) > 5
    assert torch.equal(made.draft.fusing_weight(), fusing)


def test_a_refused_solution_says_why_and_leaves_drawn_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup(tmp_path)
    drawn = made.draft.midlayer.mlp.up_proj.weight.clone()

    def unsolvable(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("the matrix is singular")

    monkeypatch.setattr("eagle_core.closed_form.start._solve", unsolvable)
    with caplog.at_level(logging.WARNING):
        found = first_weights(made, LinearSource(), None, TRAINING)
    assert found is not None
    assert not found.is_solved
    assert "singular" in found.refused
    assert "starts from random weights" in caplog.text
    assert torch.equal(made.draft.midlayer.mlp.up_proj.weight, drawn)
    assert len(made.draft.aux_scale.unique()) > 5


def test_a_run_that_has_begun_is_left_alone(tmp_path: Path) -> None:
    made = setup(tmp_path)
    record = Checkpoint(
        step=1,
        loader=LoaderState(source_id="linear", seed=0),
        identity={},
        figures={},
    )
    checkpoint.save(tmp_path, record, {}, {}, keep_last=1)
    before = weights(made)
    assert first_weights(made, LinearSource(), None, TRAINING) is None  # of an earlier version
    assert equal(before, weights(made))
    assert not (tmp_path / "start").exists()
