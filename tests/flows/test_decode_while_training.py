"""A run that decodes while it trains: with the figures of evaluate, and the weights of any run."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.config import DraftConfig
from eagle_core.errors import ConfigError, TransientError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.decoded_points import Decoded, read_points
from flows.bridge.draft_decoder import decoding_place, drafts_to_decode
from flows.config.store import StoreConfig
from flows.evaluate import evaluate_flow
from flows.hidden_states import hidden_states
from flows.offline import offline
from flows.online import online
from flows.reports.rows import train_rows
from flows.reports.run_record import REPORT_NAME
from flows.summaries import EvaluateSummary, TrainSummary
from flows.tasks.decoding import require_decodable
from flows.train import train_flow
from flows.workers.decoders import open_decoder

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server", "plots_drawn_once")]

PLAIN = TrainingConfig(
    dtype="float32",
    draft_vocab_size=300,
    ttt_length=3,
    max_steps=6,
    learning_rate=2e-3,
    batch_tokens=512,
    warmup_steps=2,
    checkpoint_every=2,
    held_out_every=3,
    keep_last=9,
)
HERE = PLAIN.model_copy(
    update={"decode_every": 2, "decode_prompts": 6, "decode_new_tokens": 32, "best_by": "decoding"}
)
CHILD = HERE.model_copy(update={"decode_device": "cpu"})
EVALUATION = EvaluationConfig(num_prompts=6, max_new_tokens=32)


@pytest.fixture(scope="module")
def target(tiny_target_path: Path) -> TargetConfig:
    """The tiny target, for all tests of this module."""
    return TargetConfig(
        name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu", batch_tokens=512
    )


@pytest.fixture(scope="module")
def dataset(conversations_path: Path) -> DatasetConfig:
    """The small data set, for all tests of this module."""
    return DatasetConfig(
        name="facts", source=str(conversations_path), held_out_fraction=0.2, max_length=256
    )


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    target: TargetConfig,
    dataset: DatasetConfig,
    prefect_server: str,  # noqa: ARG001 (a flow needs one)
) -> Path:
    """A home folder with a store that the flow has made."""
    home = tmp_path_factory.mktemp("home")
    hidden_states(target, dataset, StoreConfig(shard_tokens=600), home=str(home))
    return home


@pytest.fixture
def train(home: Path, target: TargetConfig, dataset: DatasetConfig) -> "Train":
    """Train from the store."""
    return Train(home, target, dataset)


class Train:
    """Trains runs from one store."""

    def __init__(self, home: Path, target: TargetConfig, dataset: DatasetConfig) -> None:
        self.home, self.target, self.dataset = home, target, dataset

    def __call__(self, run: str, training: TrainingConfig) -> TrainSummary:
        return train_flow(
            self.target, self.dataset, training=training, home=str(self.home), run=run
        )

    def evaluate(self, run: str, choice: str = "best") -> EvaluateSummary:
        evaluation = EVALUATION.model_copy(update={"checkpoint": choice})
        return evaluate_flow(
            self.target, self.dataset, evaluation=evaluation, home=str(self.home), run=run
        )


def weights(trained: TrainSummary) -> dict[str, Tensor]:
    """Return the weights of a run's newest checkpoint."""
    folder = checkpoint.newest(trained.run_path)
    assert folder is not None
    tensors: dict[str, Tensor] = load_file(folder / "draft.safetensors")
    return tensors


def decoded(trained: TrainSummary) -> dict[int, Decoded]:
    """Return what a run decoded, by step."""
    return {point.step: point.decoded for point in read_points(trained.run_path)}


def as_evaluated(found: EvaluateSummary) -> Decoded:
    """Return what an evaluation decoded, as a run records it."""
    by_depth = found.trained.acceptance_by_depth
    return Decoded(
        acceptance_length=found.trained.acceptance_length,
        acceptance_by_depth=tuple(share for share in by_depth if not math.isnan(share)),
    )


def test_it_has_the_figures_of_evaluate_and_the_weights_of_any_run(train: Train) -> None:
    here, child, plain = train("here", HERE), train("child", CHILD), train("plain", PLAIN)
    for name, tensor in weights(plain).items():
        assert torch.equal(weights(here)[name], tensor), name
        assert torch.equal(weights(child)[name], tensor), name
    assert list(decoded(here)) == [2, 4, 6]
    assert len(set(decoded(here).values())) == 3  # else an old draft would not be noticed
    assert decoded(child) == decoded(here)
    assert decoded(here)[6] == as_evaluated(train.evaluate("here", "newest"))
    assert plain.decoded is None

    best = here.best
    assert best is not None
    assert best.by == "decoding"
    assert best.length == max(one.acceptance_length for one in decoded(here).values())
    evaluated = train.evaluate("child")
    assert evaluated.checkpoint_step == best.step
    assert as_evaluated(evaluated) == decoded(here)[best.step]
    rows = dict(train_rows(here))
    assert rows["decoded length, step 6"] == f"{decoded(here)[6].acceptance_length:.2f}"
    assert rows["best checkpoint"] == f"step {best.step} (decoded length {best.length:.2f})"
    assert "held-out length, joint prefix" in dict(train_rows(plain))["best checkpoint"]
    page = (here.run_path / REPORT_NAME).read_text()
    assert "Decoded acceptance by depth" in page
    assert not list(child.run_path.glob("decoding*"))  # no draft is left on its way


def test_a_run_that_began_without_may_decode_and_choose_by_it_later(train: Train) -> None:
    train("later", PLAIN.model_copy(update={"max_steps": 3, "schedule": "constant"}))
    later = train("later", HERE.model_copy(update={"schedule": "constant"}))
    assert list(decoded(later)) == [2, 3, 4, 6]
    lines = map(json.loads, (later.run_path / "metrics.jsonl").read_text().splitlines())
    steps = [
        line["step"] for line in lines if "decoding/acceptance_length" in line.get("metrics", {})
    ]
    assert steps == [2, 3, 4, 6]  # with its checkpoints first, then as it goes on
    assert later.best is not None
    assert train.evaluate("later").checkpoint_step == later.best.step


def test_online_decodes_with_the_target_that_computes_the_states(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flows.online.load_decoding_target", None)
    evaluation = EVALUATION.model_copy(update={"checkpoint": "newest"})
    found = online(target, dataset, training=HERE, evaluation=evaluation, home=str(tmp_path))
    assert found.acceptance is not None
    assert list(decoded(found.training)) == [2, 4, 6]
    assert decoded(found.training)[6] == as_evaluated(found.acceptance)


def test_a_target_that_cannot_be_decoded_is_refused_before_anything_is_computed(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    streamed = target.model_copy(update={"placement": "streamed"})
    refusal = r"training\.decode_every is 2, .*set it to 0: target tiny: .*placement streamed"
    for flow in (offline, online):
        with pytest.raises(ConfigError, match=refusal):
            flow(streamed, dataset, training=HERE, home=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused(target: TargetConfig) -> None:
    number = torch.cuda.device_count()
    training = HERE.model_copy(update={"decode_device": f"cuda:{number}"})
    with pytest.raises(ConfigError, match=rf"decode_device is cuda:{number}, .*name another"):
        require_decodable(target, training)


@pytest.mark.slow
def test_ranks_wait_while_the_first_has_a_child_decode(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = train("ranks", HERE.model_copy(update={"num_processes": 2, "decode_every": 4}))
    assert list(decoded(found)) == [4, 6]
    assert found.best is not None
    assert found.best.by == "decoding"
    assert decoded(found)[6] == as_evaluated(train.evaluate("ranks", "newest"))


def test_a_child_ignores_sigterm_and_is_named_when_it_is_killed(
    tmp_path: Path, train: Train, target: TargetConfig
) -> None:
    run_path = train("to-decode", PLAIN.model_copy(update={"max_steps": 2})).run_path
    draft = DraftConfig.model_validate(
        checkpoint.read(run_path / "checkpoints" / "step-00000002").identity["draft"]
    )
    (held_out,) = (train.home / "tokens").rglob("held_out-*.arrow")
    work = drafts_to_decode(target, CHILD, draft, held_out)
    assert work is not None
    tensors = load_file(run_path / "checkpoints" / "step-00000002" / "draft.safetensors")
    with open_decoder(work, tmp_path) as decoder:
        assert decoder is not None
        first = decoder.decode(tensors).result().acceptance_length
        (pid,) = _decoding_pids(os.getpid())
        os.kill(pid, signal.SIGTERM)  # a stop request, sent to all processes of a run
        assert decoder.decode(tensors).result().acceptance_length == first
        result = decoder.decode(tensors)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(TransientError, match=r"decode_every=0.*killed by signal 9"):
            result.result()
    with open_decoder(work, tmp_path) as decoder:
        assert decoder is not None
        assert decoder.decode(tensors).result().acceptance_length == first
    assert not list(tmp_path.iterdir())
    assert list(_decoding_pids(os.getpid())) == []


def _decoding_pids(parent: int) -> Iterator[int]:
    """Yield the processes below `parent` that decode."""
    for child in psutil.Process(parent).children():
        if "flows.workers.decode_worker" in child.cmdline():
            yield child.pid


def test_without_held_out_samples_there_is_nothing_to_decode(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    whole = dataset.model_copy(update={"held_out_fraction": 0.0})
    hidden_states(target, whole, store, home=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no held-out sample .*dataset\.held_out_fraction"):
        train_flow(target, whole, store, HERE, home=str(tmp_path))


def test_a_device_that_training_uses_is_waited_for(target: TargetConfig) -> None:
    place = decoding_place(target, HERE)
    assert (place.device, place.is_child, place.is_awaited) == ("cpu", False, True)
    place = decoding_place(target, HERE.model_copy(update={"num_processes": 2}))
    assert (place.device, place.is_child, place.is_awaited) == ("cpu", True, True)
    place = decoding_place(target, CHILD)
    assert (place.device, place.is_child, place.is_awaited) == ("cpu", True, False)
