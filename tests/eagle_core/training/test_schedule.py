"""The learning rate of runs that resume with another length, or with other processes."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_core.errors import MismatchError
from eagle_core.training import checkpoint, trainer
from eagle_core.training.checkpoint import STATE
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState, steps
from eagle_core.training.pieces import WHOLE
from eagle_core.training.schedule import (
    Decay,
    PlannedRun,
    RunLength,
    RunSteps,
    learning_rate,
    new_decay,
    recorded_decay,
    resumed_decay,
    step_shape,
)
from tests.eagle_core.random_source import RandomSource
from tests.eagle_core.training.test_trainer import (
    CONFIG,
    InterruptedHereError,
    assert_equal_bits,
    interrupt_at,
    moments,
    run,
)
from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS

SOURCE = RandomSource()


def run_steps(
    config: TrainingConfig, *, done: int = 0, world_size: int = 1, trained: TrainingConfig = CONFIG
) -> RunSteps:
    """Return a run after so many steps of one process with the settings `trained`."""
    state = LoaderState(source_id="random", seed=config.seed)
    stream = steps(SOURCE, state, step_shape(trained, WHOLE))
    for loaded in itertools.islice(stream, done):
        state = loaded.after
    return RunSteps(
        config=config,
        lengths=SOURCE.lengths,
        groups=SOURCE.groups,
        windows=WHOLE,
        world_size=world_size,
        step=done,
        loader=state,
    )


def changed(**changes: object) -> TrainingConfig:
    return CONFIG.model_copy(update={"learning_rate": 1e-3, **changes})


@settings(deadline=None, max_examples=40)
@given(
    done=st.integers(0, 14),
    ranks=st.integers(1, 4),
    batches=st.integers(1, 3),
    first_batches=st.integers(1, 3),
    epochs=st.integers(1, 4),
)
def test_the_horizon_is_what_is_done_and_what_is_left(
    *, done: int, ranks: int, batches: int, first_batches: int, epochs: int
) -> None:
    """In the middle of an epoch, with other processes and batches per step than before."""
    first = changed(max_steps=None, epochs=epochs, batches_per_step=first_batches)
    done = min(done, new_decay(run_steps(first)).horizon - 1)
    config = first.model_copy(update={"batches_per_step": batches})
    resumed = run_steps(config, done=done, world_size=ranks, trained=first)
    assert resumed.loader is not None
    stream = steps(SOURCE, resumed.loader, step_shape(config, WHOLE, world_size=ranks))
    left = itertools.takewhile(lambda loaded: loaded.after.epoch < epochs, stream)
    last = done + sum(1 for _ in left) + 1
    assert resumed.last() == last
    before = new_decay(run_steps(first))
    after = resumed_decay(resumed, before)
    assert after.horizon == last
    if batches * ranks == first_batches:
        assert after == before
    rates = [learning_rate(config, step, after) for step in range(done, last + 1)]
    assert rates[0] == learning_rate(config, done, before)
    assert all(one >= two for one, two in itertools.pairwise(rates[config.warmup_steps :]))
    assert rates[-1] == pytest.approx(1e-3 * config.final_lr_ratio) or last <= config.warmup_steps


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("done", [1, 7, 19])
def test_a_longer_run_asks_for_a_choice(schedule: str, done: int) -> None:
    before = new_decay(run_steps(changed(max_steps=20, schedule=schedule)))
    longer = run_steps(changed(max_steps=50, schedule=schedule), done=done)
    with pytest.raises(MismatchError) as caught:
        resumed_decay(longer, before)
    message = str(caught.value)
    for part in (
        "training.max_steps=20",
        "training.max_steps=50",
        "training.extend=keep",
        "training.extend=restretch",
        "at step 20",
        f"over the {50 - done} steps to come",
        "--set",
    ):
        assert part in message


def test_more_epochs_ask_too_but_other_processes_do_not() -> None:
    before = new_decay(run_steps(changed(max_steps=None, epochs=2, batches_per_step=2)))
    first = changed(max_steps=None, epochs=2, batches_per_step=2)
    slower = changed(max_steps=None, epochs=2)  # half as many batches per step: more steps
    resumed = run_steps(slower, done=3, trained=first)
    assert resumed_decay(resumed, before).horizon > before.horizon
    more = run_steps(slower.model_copy(update={"epochs": 3}), done=3, trained=first)
    with pytest.raises(MismatchError, match=r"\(training\.epochs=2\).*\(training\.epochs=3\)"):
        resumed_decay(more, before)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_keep_stays_at_the_final_rate(schedule: str) -> None:
    short = changed(max_steps=20, schedule=schedule)
    before = new_decay(run_steps(short))
    longer = changed(max_steps=50, schedule=schedule, extend="keep")
    after = resumed_decay(run_steps(longer, done=7), before)
    for step in range(50):
        assert learning_rate(longer, step, after) == learning_rate(short, step, before)
    assert learning_rate(longer, 49, after) == pytest.approx(1e-3 * short.final_lr_ratio)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("done", [0, 1, 2, 7, 19])
def test_restretch_goes_on_without_a_jump_and_ends_at_the_new_end(schedule: str, done: int) -> None:
    short = changed(max_steps=20, schedule=schedule)
    before = new_decay(run_steps(short))
    longer = changed(max_steps=50, schedule=schedule, extend="restretch")
    after = resumed_decay(run_steps(longer, done=done), before)
    assert learning_rate(longer, done, after) == learning_rate(short, done, before)
    rates = [learning_rate(longer, step, after) for step in range(max(done, 2), 51)]
    assert all(one > two for one, two in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(1e-3 * short.final_lr_ratio)
    # Each step does as much of the decay as any other: the old curve, only slower.
    share = (before.done(done + 1) - before.done(done)) * (20 - max(done, 2)) / (50 - max(done, 2))
    if done > 2:
        assert after.done(done + 1) - after.done(done) == pytest.approx(share)


def test_after_the_end_of_the_decay_both_stay_at_the_final_rate() -> None:
    before = new_decay(run_steps(changed(max_steps=20)))
    for extend in ("keep", "restretch"):
        longer = changed(max_steps=50, extend=extend)
        after = resumed_decay(run_steps(longer, done=20), before)
        final = 1e-3 * longer.final_lr_ratio
        assert all(
            learning_rate(longer, step, after) == pytest.approx(final) for step in range(20, 51)
        )


def test_what_was_agreed_to_is_not_asked_again() -> None:
    before = new_decay(run_steps(changed(max_steps=20)))
    kept = resumed_decay(run_steps(changed(max_steps=50, extend="keep"), done=7), before)
    assert resumed_decay(run_steps(changed(max_steps=50), done=9), kept) == kept
    assert resumed_decay(run_steps(changed(max_steps=40), done=9), kept) == kept
    with pytest.raises(MismatchError, match="60 are asked for"):
        resumed_decay(run_steps(changed(max_steps=60), done=9), kept)
    again = changed(max_steps=50, extend="restretch")
    stretched = resumed_decay(run_steps(again, done=9), kept)
    assert (stretched.horizon, stretched.first_step) == (50, 9)
    assert resumed_decay(run_steps(again, done=30), stretched) == stretched


def test_a_constant_rate_needs_no_choice() -> None:
    before = new_decay(run_steps(changed(max_steps=20, schedule="constant")))
    longer = changed(max_steps=50, schedule="constant")
    after = resumed_decay(run_steps(longer, done=7), before)
    assert {learning_rate(longer, step, after) for step in range(7, 50)} == {1e-3}


def test_a_shorter_run_decays_as_if_it_had_always_been_as_short() -> None:
    before = new_decay(run_steps(changed(max_steps=50)))
    shorter = changed(max_steps=20)
    assert resumed_decay(run_steps(shorter, done=7), before) == new_decay(run_steps(shorter))
    assert resumed_decay(run_steps(shorter, done=20), before) == before, "nothing is left to do"


def test_a_stretched_run_that_is_made_shorter_has_no_higher_rate() -> None:
    before = new_decay(run_steps(changed(max_steps=20)))
    long = changed(max_steps=200, extend="restretch")
    stretched = resumed_decay(run_steps(long, done=19), before)
    shorter = changed(max_steps=150)
    after = resumed_decay(run_steps(shorter, done=25), stretched)
    assert learning_rate(shorter, 25, after) == learning_rate(long, 25, stretched)
    assert after.horizon == 150


def test_a_checkpoint_of_an_earlier_version_decays_as_its_run_recorded() -> None:
    resumed = run_steps(changed(max_steps=50), done=7)
    unknown = recorded_decay(resumed, None)
    assert unknown == new_decay(resumed)
    length = RunLength(epochs=1, max_steps=20)
    found = recorded_decay(resumed, PlannedRun(length=length, num_steps=20))
    assert found == new_decay(run_steps(changed(max_steps=20)))
    with pytest.raises(MismatchError, match=r"training\.extend"):
        resumed_decay(resumed, found)
    # Its processes have changed since: the rate goes on from where that version left it.
    epochs = changed(max_steps=None)
    planned = PlannedRun(length=RunLength(epochs=1), num_steps=40)
    old = recorded_decay(run_steps(epochs, done=3), planned)
    after = resumed_decay(run_steps(epochs, done=3), old)
    assert after.horizon == run_steps(epochs).last() != 40
    assert learning_rate(epochs, 3, after) == learning_rate(epochs, 3, old)


@pytest.mark.parametrize("extend", ["keep", "restretch"])
@pytest.mark.parametrize("lengths", [({"max_steps": 6}, {"max_steps": 12}), ({}, {"epochs": 3})])
def test_a_longer_run_that_is_broken_off_ends_with_the_same_bits(
    tmp_path: Path, extend: str, lengths: tuple[dict[str, object], dict[str, object]]
) -> None:
    """The choice is needed once: the checkpoints record it."""
    short = CONFIG.model_copy(update={"max_steps": None, **lengths[0]})
    longer = CONFIG.model_copy(update={"max_steps": None, **lengths[1]})
    for name in ("whole", "broken"):
        with pytest.raises(InterruptedHereError):
            run(tmp_path / name, short, on_progress=interrupt_at(5))
        with pytest.raises(MismatchError, match=r"training\.extend=keep"):
            run(tmp_path / name, longer)
    chosen = longer.model_copy(update={"extend": extend})
    expected, _ = run(tmp_path / "whole", chosen)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", chosen, on_progress=interrupt_at(9))
    found, _ = run(tmp_path / "broken", longer)
    assert_equal_bits(found, expected)
    assert_equal_bits(moments(tmp_path / "broken"), moments(tmp_path / "whole"))


def test_kept_runs_have_the_bits_of_the_shorter_one_until_its_end(tmp_path: Path) -> None:
    short = CONFIG.model_copy(update={"max_steps": 8})
    expected, _ = run(tmp_path / "short", short)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "long", short, on_progress=interrupt_at(5))
    kept = CONFIG.model_copy(update={"max_steps": 10, "extend": "keep", "keep_last": 9})
    run(tmp_path / "long", kept)
    found = checkpoint.load_file(tmp_path / "long/checkpoints/step-00000008/draft.safetensors")
    assert_equal_bits(found, {name: expected[name] for name in found})


def without_decay(path: Path) -> None:
    """Make the newest checkpoint one of an earlier version."""
    folder = checkpoint.newest(path)
    assert folder is not None
    state = json.loads((folder / STATE).read_text())
    del state["decay"]
    (folder / STATE).write_text(json.dumps(state))
    assert checkpoint.read(folder).decay is None


def test_a_run_of_an_earlier_version_resumes_exactly(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole")
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", on_progress=interrupt_at(5))
    without_decay(tmp_path / "broken")
    found, _ = run(tmp_path / "broken")
    assert_equal_bits(found, expected)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedRun:
    """What an earlier version planned for the run that it broke off after step 4 of 8."""
    with pytest.raises(InterruptedHereError):
        run(tmp_path, CONFIG.model_copy(update={"max_steps": 8}), on_progress=interrupt_at(5))
    without_decay(tmp_path)
    planned = PlannedRun(length=RunLength(epochs=1, max_steps=8), num_steps=8)
    train = trainer.train
    monkeypatch.setattr(
        "tests.eagle_core.training.test_trainer.train",
        lambda **given: train(**given, planned=planned),
    )
    return planned


def test_what_an_earlier_version_planned_is_kept_before_its_files_change(
    tmp_path: Path, planned: PlannedRun
) -> None:
    """An attempt of another length that writes no checkpoint must not change the horizon."""
    with pytest.raises(MismatchError, match=r"decays over 8 .*and 12 are asked for"):
        run(tmp_path)
    kept = CONFIG.model_copy(update={"extend": "keep"})
    with pytest.raises(InterruptedHereError):
        run(tmp_path, kept, on_progress=interrupt_at(5))
    folder = checkpoint.newest(tmp_path)
    assert folder is not None
    found = checkpoint.read(folder)
    assert found.step == 4
    assert found.decay == Decay(
        length=planned.length, horizon=8, first_step=2, allowed=planned.length
    )


def test_an_attempt_with_nothing_to_do_keeps_what_an_earlier_version_planned(
    tmp_path: Path, planned: PlannedRun
) -> None:
    """The run's other files say how long that attempt was, from then on."""
    run(tmp_path, CONFIG.model_copy(update={"max_steps": 2}))
    folder = checkpoint.newest(tmp_path)
    assert folder is not None
    found = checkpoint.read(folder)
    assert found.step == 4
    assert found.decay == Decay(
        length=planned.length, horizon=8, first_step=2, allowed=planned.length
    )


def test_a_finished_run_of_an_earlier_version_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path)
    without_decay(tmp_path)
    run(tmp_path)
    without = checkpoint.newest(tmp_path)
    assert without is not None
    assert checkpoint.read(without).decay is None


def test_a_decay_survives_its_record(tmp_path: Path) -> None:
    decay = Decay(
        length=RunLength(epochs=3),
        horizon=50,
        first_step=7,
        first_done=1 / 3,
        allowed=RunLength(epochs=1, max_steps=60),
    )
    record = checkpoint.Checkpoint(
        step=9,
        loader=LoaderState(source_id="here", seed=0),
        identity={},
        figures={},
        decay=decay,
    )
    tensors = {"x": torch.ones(1)}
    folder = checkpoint.save(tmp_path, record, tensors, tensors, keep_last=1)
    assert checkpoint.read(folder) == record
    assert dataclasses.replace(record, decay=None) != record


def test_rates_of_a_run_that_never_stopped_are_those_of_earlier_versions() -> None:
    """Bit for bit: a run that an update finds in the middle goes on with the same rates."""
    config = changed(max_steps=30)
    decay = new_decay(run_steps(config))
    for step in range(2, 30):
        done = min(1.0, (step - 2) / 28)
        remaining = 0.5 * (1.0 + np.cos(np.pi * done))
        expected = 1e-3 * (0.05 + 0.95 * remaining)
        assert learning_rate(config, step, decay) == pytest.approx(expected, rel=1e-15)
        assert decay.done(step) == done


_RANKS = """
import json, sys
from pathlib import Path
from eagle_core.training.distributed import join_processes
from tests.eagle_core.training.test_trainer import CONFIG, run
with join_processes():
    run(Path(sys.argv[1]), CONFIG.model_validate(json.loads(sys.argv[2])))
"""


@pytest.mark.slow
def test_two_ranks_go_on_in_the_middle_of_an_epoch_of_one(tmp_path: Path) -> None:
    """From a checkpoint of an earlier version; the decay ends with the run's last step."""
    config = CONFIG.model_copy(update={"max_steps": None, "epochs": 3, "checkpoint_every": 1})
    with pytest.raises(InterruptedHereError):
        run(tmp_path, config, on_progress=interrupt_at(4))
    without_decay(tmp_path)
    script = tmp_path / "ranks.py"
    script.write_text(_RANKS)
    given = config.model_copy(update={"keep_last": 99}).model_dump(mode="json")
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), str(tmp_path), json.dumps(given)),
        ],
        check=True,
        timeout=LIMIT_SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    alone = new_decay(run_steps(config)).horizon
    saved = [checkpoint.read(folder) for folder in checkpoint.sound_folders(tmp_path)]
    last = saved[0]
    assert last.decay is not None
    assert last.decay.horizon == last.step < alone
    assert last.loader.epoch == 3
    (first,) = (record for record in saved if record.step == 3)
    assert first.decay is not None, "the earlier version's checkpoint has it now"
    assert {record.decay for record in saved if record.step > 3} == {last.decay}
