"""Flows with a target that real vLLM runs.

make test-engine
"""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.estimate import estimate_flow
from flows.hidden_states import hidden_states
from flows.plan import plan
from flows.reports.store_tables import cost_rows
from flows.train import train_flow
from storage.errors import MismatchError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.flows.trees import digests
from tests.tiny import write_target
from tests.waiting import wait_for

PYTHON = os.environ.get("EYAS_VLLM_PYTHON")
TRAINING = TrainingConfig(dtype="float32", draft_vocab_size=300, max_steps=3, batch_tokens=256)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM; see CONTRIBUTING.md: make test-engine"),
]


@pytest.fixture
def served(tmp_path: Path) -> TargetConfig:
    """A tiny target with heads of a size that vLLM has kernels for."""
    return TargetConfig(
        name="tiny",
        model=str(write_target(tmp_path / "target", head_dim=32)),
        dtype="float32",
        device="cpu",
        backend="vllm",
        vllm_python=str(PYTHON),
    )


def kill_engine(store_root: Path, killed: list[int]) -> None:
    """Kill vLLM as soon as a shard is committed."""
    wait_for(lambda: any(store_root.glob("commits/*.json")), what="a committed shard")
    for process in psutil.Process().children(recursive=True):
        if any(part.endswith("eyas_engine.py") for part in process.cmdline()):
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)


def test_a_store_of_its_states_survives_its_death_and_trains(
    tmp_path: Path, served: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    whole = hidden_states(target=served, dataset=dataset, store=store, home=str(tmp_path / "a"))
    root = tmp_path / "b" / Path(whole.store_root).relative_to(tmp_path / "a")
    killed: list[int] = []
    killing = threading.Thread(target=kill_engine, args=(root, killed))
    killing.start()
    made = hidden_states(target=served, dataset=dataset, store=store, home=str(tmp_path / "b"))
    killing.join()
    assert len(killed) == 1
    assert made.num_shards == whole.num_shards > 4
    found = Store.open(made.store_root)
    assert verify_store(found, deep=True) == []
    kept = snapshots_to_keep(found, older_than_hours=0)
    collect(found, find_garbage(found, keep=kept, older_than_hours=0))  # of the killed process
    assert digests(root) == digests(Path(whole.store_root))

    trained = train_flow(
        served, dataset, store=store, training=TRAINING, home=str(tmp_path / "b"), run="main"
    )
    assert trained.num_steps == 3

    elsewhere = served.model_copy(update={"vllm_python": "not/installed"})  # the store says which
    estimate = estimate_flow(elsewhere, dataset, store, TRAINING, home=str(tmp_path / "b"))
    assert estimate.checkpoint_step == 3

    plain = served.model_copy(update={"backend": "transformers"})
    with pytest.raises(MismatchError, match=r"target backend: found 'vllm [\d.]+', expected None"):
        hidden_states(target=plain, dataset=dataset, store=store, home=str(tmp_path / "b"))


def test_a_plan_measures_it(
    tmp_path: Path, served: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    estimate = plan(target=served, dataset=dataset, store=store, home=str(tmp_path))
    rows = dict(cost_rows(estimate))
    assert rows["placement"].startswith("vllm")
    assert estimate.tokens_per_second > 0
    assert estimate.recompute is None
    omitting = store.model_copy(update={"recompute": True})
    with pytest.raises(
        ConfigError, match=r"cannot be recomputed to the bit.* set store\.recompute"
    ):
        hidden_states(target=served, dataset=dataset, store=omitting, home=str(tmp_path))
