"""A run's first weights are made once, and every attempt begins with the same."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eagle_core.errors import ConfigError
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import Checkpoint
from eagle_core.training.config import WHOLE_SAMPLES, TrainingConfig
from eagle_core.training.loader import LoaderState
from eagle_core.training.packing import PackedBatch, pack
from eagle_core.training.result import Metrics, Start
from eagle_core.training.ttt import ttt_step
from eagle_core.training.validation import measure
from flows.bridge.draft_setup import DraftSetup, require_start
from flows.bridge.first_weights import as_begun, first_weights, load_first_weights, read_start
from flows.reports.rows import train_rows
from flows.summaries import TrainSummary
from flows.workers import train_worker
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
    assert not found.is_drawn
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


def test_a_flipped_bit_is_not_loaded(tmp_path: Path) -> None:
    first, second = setup(tmp_path), setup(tmp_path)
    first_weights(first, LinearSource(), None, RANDOM)
    path = tmp_path / "start" / "draft.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    before = weights(second)
    assert not load_first_weights(second)
    assert equal(before, weights(second))


def test_weights_of_another_shape_change_nothing(tmp_path: Path) -> None:
    first_weights(setup(tmp_path), LinearSource(), None, RANDOM)
    other = DraftSetup(
        run_path=tmp_path, draft=small_draft(intermediate_size=64), target_lm_head=HEAD
    )
    before = weights(other)
    assert not load_first_weights(other)
    assert equal(before, weights(other))


def test_without_held_out_samples_its_own_measure_it(tmp_path: Path) -> None:
    found = first_weights(setup(tmp_path), LinearSource(), None, TRAINING)
    assert found is not None
    assert not found.is_drawn
    assert not found.is_held_out
    assert found.scalars() == {}


def test_drawn_weights_read_scaled_channels(tmp_path: Path) -> None:
    made = setup(tmp_path)
    drawn = made.draft.fc.weight.clone()
    found = first_weights(made, LinearSource(), None, RANDOM)
    assert found is not None
    assert (found.kind, found.is_drawn, found.accuracies) == ("random", True, ())
    assert torch.equal(made.draft.fc.weight, drawn)
    assert len(made.draft.aux_scale.unique()) > 5


@pytest.mark.parametrize("start", ["random", "/some/draft"])
def test_the_first_step_has_gradients_of_its_own_only(tmp_path: Path, start: str) -> None:
    made = DraftSetup(run_path=tmp_path, draft=small_draft(fc_norm=True), target_lm_head=HEAD)
    source, training = LinearSource(), TRAINING.model_copy(update={"start": start})
    first_weights(made, source, None, training)
    assert not made.draft.aux_scale.requires_grad
    batch = pack([source.fetch(row) for row in range(4)])
    for _ in range(2):
        ttt_step(made.draft, batch, HEAD[made.draft.t2d], training).loss.backward()
    assert made.draft.fc_norm[0].weight.grad is not None


def test_a_given_draft_keeps_its_function(tmp_path: Path) -> None:
    made = setup(tmp_path)
    fusing = made.draft.fusing_weight().clone()
    training = TRAINING.model_copy(update={"start": "/some/draft"})
    found = first_weights(made, LinearSource(), None, training)
    assert found is not None
    assert (found.kind, found.refit_from) == ("/some/draft", ())
    assert len(found.accuracies) == 3  # as given
    assert len(made.draft.aux_scale.unique()) > 5
    assert torch.equal(made.draft.fusing_weight(), fusing)


def test_another_draft_in_the_same_folder_is_not_taken_for_the_first(tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"start": "/some/draft"})
    first_weights(setup(tmp_path), LinearSource(), None, training)
    other = setup(tmp_path, seed=7)
    first_weights(other, LinearSource(), None, training)
    expected = setup(tmp_path, seed=7).draft.fusing_weight()
    assert torch.equal(other.draft.fusing_weight(), expected)


def test_settings_that_do_not_matter_change_nothing(tmp_path: Path) -> None:
    first_weights(setup(tmp_path), LinearSource(), None, TRAINING)
    source = LinearSource()
    others = {"learning_rate": 1e-4, "weight_decay": 0.1, "max_steps": 5}
    first_weights(setup(tmp_path), source, None, TRAINING.model_copy(update=others))
    assert source.num_fetched == 0


def begin(path: Path, rate: float, **training: object) -> None:
    """Write a checkpoint of a run with this peak learning rate and other settings."""
    record = Checkpoint(
        step=1,
        loader=LoaderState(source_id="linear", seed=0),
        identity={"training": {"learning_rate": rate, **training}},
        figures={},
    )
    checkpoint.save(path, record, {}, {}, keep_last=1)


@pytest.mark.parametrize(
    ("start", "recorded", "expected"),
    [
        (TRAINING, None, 3e-4),
        (RANDOM, None, 1e-3),
        (TRAINING, 1e-3, 1e-3),  # a run of an earlier version: its weights were drawn
        (RANDOM, 3e-4, 3e-4),  # `start` was changed after the run had begun
    ],
)
def test_a_rate_that_is_not_named_stays_that_of_the_run(
    tmp_path: Path, start: TrainingConfig, recorded: float | None, expected: float
) -> None:
    if recorded is not None:
        begin(tmp_path, recorded)
    found = as_begun(start, tmp_path)
    assert found.peak_learning_rate == expected
    assert found.identity()["learning_rate"] == expected
    named = start.model_copy(update={"learning_rate": 2e-3})
    assert as_begun(named, tmp_path).peak_learning_rate == 2e-3


@pytest.mark.parametrize(
    ("recorded", "given", "expected"),
    [
        ({}, None, WHOLE_SAMPLES),  # of an earlier version
        ({"window_tokens": 4096}, None, 4096),
        ({"window_tokens": 4096}, 512, 512),  # which the checkpoint refuses
        (None, None, 8192),  # a new run
    ],
)
def test_a_window_that_is_not_named_stays_that_of_the_run(
    tmp_path: Path, recorded: dict[str, int] | None, given: int | None, expected: int
) -> None:
    if recorded is not None:
        begin(tmp_path, 3e-4, **recorded)
    found = as_begun(TRAINING.model_copy(update={"window_tokens": given}), tmp_path)
    assert found.piece_tokens == found.identity()["window_tokens"] == expected


def test_weights_are_solved_from_long_samples_within_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("eagle_core.closed_form.sampled_batches", "flows.bridge.first_weights"):
        monkeypatch.setattr(f"{module}._BATCH_TOKENS", 100)
    sizes: list[int] = []

    def measured(step: object, batches: Iterable[PackedBatch], head: Tensor) -> object:
        kept = list(batches)
        sizes.extend(batch.num_tokens for batch in kept)
        return measure(step, kept, head)  # type: ignore[arg-type]

    monkeypatch.setattr("eagle_core.closed_form.start.measure", measured)
    training = TRAINING.model_copy(update={"batch_tokens": 100})
    source, held_out = LinearSource(longest=300), LinearSource(longest=300, num_samples=5, seed=1)
    found = first_weights(setup(tmp_path), source, held_out, training)
    assert found is not None
    assert 5120 <= found.num_tokens < 5120 + 300
    assert found.acceptance_length > 2
    assert max(sizes) <= 100
    again = setup(tmp_path)
    source.num_fetched = 0
    first_weights(again, source, held_out, training)
    assert source.num_fetched == 0
    first_weights(again, source, held_out, training.model_copy(update={"window_tokens": 50}))
    assert source.num_fetched > 0, "what is solved depends on the window a little"


def test_a_rate_that_destroys_solved_weights_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = TRAINING.model_copy(update={"learning_rate": 1e-3})
    first_weights(setup(tmp_path), LinearSource(), None, training)
    assert "training.learning_rate is 0.001: it soon destroys solved weights" in caplog.text


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
    assert found.is_drawn
    assert "singular" in found.refused
    assert "starts from random weights" in caplog.text
    assert torch.equal(made.draft.midlayer.mlp.up_proj.weight, drawn)
    assert len(made.draft.aux_scale.unique()) > 5
    assert as_begun(TRAINING, tmp_path).peak_learning_rate == 1e-3
    assert found.accuracies == ()


def test_a_draft_that_cannot_be_solved_names_its_variant_and_trains_as_drawn_weights_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, again = (
        DraftSetup(
            run_path=tmp_path, draft=small_draft(qk_norm=True, hidden_size=24), target_lm_head=HEAD
        )
        for _ in range(2)
    )
    found = first_weights(made, LinearSource(), None, TRAINING)
    assert found is not None
    assert found.is_drawn
    assert "starts from random weights" in caplog.text
    assert "draft.qk_norm norms the queries" in caplog.text
    assert "draft.hidden_size is 24" in caplog.text
    assert as_begun(TRAINING, tmp_path).peak_learning_rate == 1e-3
    kept = load_file(tmp_path / "start" / "draft.safetensors")
    assert torch.equal(kept["embed_tokens.weight"], made.draft.embed_tokens.weight)
    assert first_weights(again, LinearSource(), None, TRAINING) == found
    assert equal(weights(made), weights(again))


def test_a_run_keeps_the_solved_weights_of_a_draft_with_the_targets_head(tmp_path: Path) -> None:
    variant = {"num_hidden_layers": 2, "target_head": True, "draft_vocab_size": 60}
    first, second = (
        DraftSetup(run_path=tmp_path, draft=small_draft(**variant), target_lm_head=HEAD)
        for _ in range(2)
    )
    found = first_weights(first, LinearSource(), None, TRAINING)
    assert found is not None
    assert not found.is_drawn
    assert "lm_head.weight" not in load_file(tmp_path / "start" / "draft.safetensors")
    assert load_first_weights(second)
    assert equal(weights(first), weights(second))
    assert torch.equal(second.draft.lm_head.weight, HEAD)


def test_a_folder_that_is_not_there_is_named_with_the_other_choices(tmp_path: Path) -> None:
    for start in ("closedform", str(tmp_path / "draft")):
        with pytest.raises(ConfigError, match=r"no such folder: give closed_form, random, or the"):
            require_start(TRAINING.model_copy(update={"start": start}), tmp_path)
    for start in ("closed_form", "random", str(tmp_path), None):
        require_start(TRAINING.model_copy(update={"start": start}), tmp_path)


def test_a_run_that_has_begun_no_longer_needs_the_given_draft(tmp_path: Path) -> None:
    begin(tmp_path, 1e-3)
    require_start(TRAINING.model_copy(update={"start": str(tmp_path / "gone")}), tmp_path)


def test_a_run_that_has_begun_is_left_alone(tmp_path: Path) -> None:
    made = setup(tmp_path)
    begin(tmp_path, 1e-3)
    before = weights(made)
    assert first_weights(made, LinearSource(), None, TRAINING) is None  # of an earlier version
    assert equal(before, weights(made))
    assert not (tmp_path / "start").exists()


class Recorded:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        assert scalars["held_out/acceptance_length"] > 2
        self.steps.append(step)


def test_a_tracker_has_a_solved_start_as_step_0_once(tmp_path: Path) -> None:
    held_out, tracker = LinearSource(num_samples=20, seed=1), Recorded()
    settings = train_worker.begin(setup(tmp_path), LinearSource(), held_out, TRAINING, tracker)
    assert tracker.steps == [0]
    assert settings.peak_learning_rate == 3e-4
    begin(tmp_path, 2e-4)
    settings = train_worker.begin(setup(tmp_path), LinearSource(), held_out, TRAINING, tracker)
    assert tracker.steps == [0]
    assert settings.peak_learning_rate == 2e-4


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (None, "random"),
        (Start(kind="random", num_tokens=1, seconds=1.0), "random"),
        (Start(kind="/a/draft", num_tokens=1, seconds=1.0), "/a/draft"),
        (
            Start(kind="closed_form", num_tokens=1, seconds=1.0, refused="they are not finite"),
            "random, for solved weights were refused: they are not finite",
        ),
        (
            Start(
                kind="closed_form",
                num_tokens=1,
                seconds=39.2,
                accuracies=(0.265, 0.2),
                acceptance_length=1.351,
            ),
            (
                "closed form: held-out length, joint prefix 1.35, accuracy by TTT step 26.5%  "
                "20.0% (39 s)"
            ),
        ),
        (
            Start(
                kind="/a/draft",
                refit_from=(1, 3, 4),
                misfit=0.0312,
                num_tokens=1,
                seconds=7.0,
                accuracies=(0.3,),
                acceptance_length=1.3,
                is_held_out=False,
            ),
            (
                "/a/draft, refit from aux layers 1, 3, 4 (misfit 3.1%): length on its own samples, "
                "joint prefix 1.30, accuracy by TTT step 30.0% (7 s)"
            ),
        ),
    ],
)
def test_the_table_says_how_a_run_began(start: Start | None, expected: str) -> None:
    summary = TrainSummary(
        run_path=Path("run"),
        source_id="s",
        num_steps=1,
        figures=Metrics(loss=1.0, first_loss=2.0),
        vocabulary_coverage=1.0,
        tokens_per_second=1.0,
        dtype="float32",
        seconds=1.0,
        start=start,
    )
    assert dict(train_rows(summary))["start"] == expected
