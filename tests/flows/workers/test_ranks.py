"""Several processes train one draft: to the same weights, through SIGTERM, SIGKILL and damage."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from flows.bridge.semantic_probe import SHARDS_AT_TRAIN_START
from flows.config.store import StoreConfig
from flows.errors import ChildKilledError, TrainingStoppedError
from flows.hidden_states import hidden_states
from flows.online import online
from flows.summaries import TrainSummary
from flows.train import train_flow
from storage.errors import CorruptError
from storage.store import Store

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

ENDLESS = 100_000
RANKS = TrainingConfig(
    dtype="float32",
    draft_vocab_size=300,
    ttt_length=2,
    batch_tokens=256,
    schedule="constant",
    warmup_steps=2,
    max_steps=ENDLESS,
    checkpoint_every=1,
    held_out_every=1000,
    num_processes=2,
)

Train = Callable[..., TrainSummary]


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
    store = StoreConfig(shard_tokens=600)
    hidden_states(target=target, dataset=dataset, store=store, home=str(home))
    return home


@pytest.fixture
def train(
    home: Path, target: TargetConfig, dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Train]:
    """Train from the store, with one thread a process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one process trains in this one: with more, sums differ

    def run(name: str, **changes: object) -> TrainSummary:
        training = RANKS.model_copy(update=changes)
        return train_flow(
            target=target, dataset=dataset, training=training, home=str(home), run=name
        )

    yield run
    torch.set_num_threads(num_threads)


def _run_path(home: Path, name: str) -> Path:
    return home / "runs" / f"tiny-facts-{name}"


def _newest_step(run_path: Path) -> int:
    folder = checkpoint.newest(run_path)
    return 0 if folder is None else checkpoint.read(folder).step


def _weights(run_path: Path) -> dict[str, Tensor]:
    folder = checkpoint.newest(run_path)
    assert folder is not None
    tensors: dict[str, Tensor] = load_file(folder / "draft.safetensors")
    return tensors


def _rank_pids(parent: int) -> Iterator[int]:
    """Yield the processes that torchrun, a child of `parent`, has started, by rank."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid in sorted(pid for pid, above in parents.items() if parents.get(above) == parent):
        if "flows.workers.train_worker" in Path(f"/proc/{pid}/cmdline").read_text():
            yield pid


@contextmanager
def _after_a_checkpoint(run_path: Path, act: Callable[[], None]) -> Iterator[None]:
    """Do something once the run has a checkpoint that is newer than now."""
    before = _newest_step(run_path)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            names = [path.name for path in run_path.glob("checkpoints/step-*")]
            if max((int(name.removeprefix("step-")) for name in names), default=0) > before:
                act()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert _newest_step(run_path) > before


def test_stopped_killed_and_resumed_ranks_make_the_steps_of_one_process(
    home: Path, train: Train
) -> None:
    two = _run_path(home, "two")

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def kill_second_rank() -> None:
        os.kill(list(_rank_pids(os.getpid()))[1], signal.SIGKILL)

    with (
        pytest.raises(TrainingStoppedError, match=r"two was stopped at step \d+ .*run the same"),
        _after_a_checkpoint(two, stop),
    ):
        train("two")
    assert list(_rank_pids(os.getpid())) == []
    with (
        pytest.raises(ChildKilledError, match=r"(?s)tiny-facts-two in 2 processes .*SIGKILL"),
        _after_a_checkpoint(two, kill_second_rank),
    ):
        train("two")
    assert list(_rank_pids(os.getpid())) == []

    num_steps = _newest_step(two) + 2
    found = train("two", max_steps=num_steps)
    expected = train("one", max_steps=num_steps, num_processes=1, batches_per_step=2)

    assert found.num_steps == expected.num_steps == num_steps
    weights = _weights(two)
    for name, tensor in _weights(_run_path(home, "one")).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)
    assert found.source_id == expected.source_id
    assert found.vocabulary_coverage == expected.vocabulary_coverage
    assert found.figures.loss == pytest.approx(expected.figures.loss, rel=1e-4)
    assert found.figures.held_out_accuracies == pytest.approx(
        expected.figures.held_out_accuracies, rel=1e-3
    )
    solved, alone = found.start, expected.start
    assert solved is not None
    assert alone is not None
    assert not solved.is_drawn
    assert solved.accuracies == pytest.approx(alone.accuracies, abs=0.01)
    assert len(list((two / "tensorboard").glob("events.*"))) == 3  # one an attempt


def test_another_number_of_processes_may_go_on_with_a_run() -> None:
    alone = RANKS.model_copy(update={"num_processes": 1, "batches_per_step": 2})
    assert alone.identity() == RANKS.identity()
    assert RANKS.model_copy(update={"seed": 1}).identity() != RANKS.identity()


def test_a_damaged_shard_is_named_by_its_own_error(home: Path, train: Train) -> None:
    (root,) = (home / "stores").iterdir()
    opened = Store.open(str(root))
    shards = opened.snapshot().shard_ids
    seen = np.linspace(0, len(shards) - 1, SHARDS_AT_TRAIN_START).astype(int).tolist()
    unseen = sorted(set(range(len(shards))) - set(seen))
    shard_id = shards[unseen[0]]  # the flow itself looks at the others before it starts the ranks
    objects = [path for path in (root / "shards" / shard_id).rglob("*") if path.is_file()]
    states = max(objects, key=lambda path: path.stat().st_size)
    damaged = bytearray(states.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    states.write_bytes(damaged)

    with pytest.raises(CorruptError, match=rf"^shard {shard_id}.*eyas repair") as caught:
        train("damaged")
    assert "must not be trained on" not in str(caught.value)  # what the flow itself would say
    assert list(_rank_pids(os.getpid())) == []


def test_more_processes_than_gpus_are_refused_before_anything_is_done(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    processes = torch.cuda.device_count() + 2
    training = RANKS.model_copy(update={"num_processes": processes})
    on_gpus = target.model_copy(update={"device": "cuda"})
    with pytest.raises(ConfigError, match=rf"num_processes is {processes}, but this machine shows"):
        train_flow(target=on_gpus, dataset=dataset, training=training, home=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_online_with_several_processes_is_refused_before_anything_is_done(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    with pytest.raises(ConfigError, match=r"num_processes is 2.*offline flow"):
        online(target=target, dataset=dataset, training=RANKS, home=str(tmp_path))
    assert not list(tmp_path.iterdir())
