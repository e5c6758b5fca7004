"""Stores, runs and checkpoints that earlier versions wrote are continued.

`tests/fixtures/make_old_run.py` made them with those versions: `format-2` has the store's format
before this one, `format-3` comes from the last version that kept its modules in flat packages.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from eagle_core.closed_form.state_sizes import StateSizes
from eagle_core.draft.model import DraftModel
from eagle_core.errors import MismatchError
from eagle_core.training.config import RANDOM, WHOLE_SAMPLES
from flows.evaluate import evaluate_flow
from flows.gc import gc_flow
from flows.hidden_states import hidden_states
from flows.repair import repair_flow
from flows.train import train_flow
from storage.errors import CorruptError
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.fixtures.make_old_run import CONVERSATIONS, MORE, recipe, training
from tests.paths import FIXTURES
from tests.storage.synthetic import committed_samples

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]
STEPS = 4


def _extract(name: str, folder: Path) -> None:
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")


@pytest.fixture
def format_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the fixture's recipe, as another version left it."""
    _extract("format-2", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["format-2", "format-3"])
def old(request: pytest.FixtureRequest, format_2: Path) -> Path:
    """The same for each of the versions; all of them have the target of `format-2`."""
    if request.param != "format-2":
        shutil.rmtree(format_2 / "home")
        _extract(request.param, format_2)
    return format_2


def _store() -> Store:
    return Store.open("home/stores/tiny-grows")


def _weights(run: str) -> dict[str, np.ndarray]:
    folder = Path("home/runs") / f"tiny-grows-{run}" / "checkpoints" / f"step-{STEPS:08d}"
    return load_file(folder / "draft.safetensors")


def _unscaled(draft: DraftModel, *_: object) -> StateSizes:
    return StateSizes(aux_scale=torch.ones_like(draft.aux_scale), final_gain=torch.ones(0))


@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as one that this release made from the first step on."""
    assert verify_store(_store(), deep=True) == []
    begun = json.loads(Path("home/runs/tiny-grows-main/run.json").read_text())["source_id"]
    with pytest.raises(MismatchError, match=r"\(training\.max_steps=2\), and 4 are asked for"):
        train_flow(**recipe(old), training=training(STEPS), run="main")
    longer = training(STEPS).model_copy(update={"extend": "restretch"})
    done = train_flow(**recipe(old), training=longer, run="main")
    assert done.num_steps == STEPS
    state = Path(f"home/runs/tiny-grows-main/checkpoints/step-{STEPS:08d}/state.json")
    own = json.loads(state.read_text())["identity"]["training"]
    assert own["window_tokens"] == WHOLE_SAMPLES, "it divides no sample, as it began"
    assert json.loads(Path("home/runs/tiny-grows-main/run.json").read_text())["source_id"] == begun

    # A data set of this release would hold out other conversations than the run began with, and
    # a run of this release would begin with channels of like size.
    monkeypatch.setattr("flows.bridge.first_weights.measure_state_sizes", _unscaled)
    drawn = training(STEPS).model_copy(update={"start": RANDOM})
    train_flow(**recipe(old), training=drawn, run="again", snapshot_id=begun)
    expected, found = _weights("again"), _weights("main")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)

    summary = evaluate_flow(
        run="main", **{key: value for key, value in recipe(old).items() if key != "store"}
    )
    assert summary.checkpoint_step == STEPS


@pytest.mark.slow
def test_a_store_is_added_to_repaired_and_collected(format_2: Path) -> None:
    old = format_2
    store = _store()
    before = store.commits()
    assert {record.format_version for record in before.values()} == {2}
    made = hidden_states(**recipe(old))
    assert made.num_samples == CONVERSATIONS + MORE
    store = _store()
    assert store.identity.to_json() == Store.open("home/stores/tiny-grows").identity.to_json()
    added = {name: record for name, record in store.commits().items() if name not in before}
    assert {record.format_version for record in added.values()} == {3}
    assert {name: store.commit(name) for name in before} == before, "nothing is written again"
    assert verify_store(store, deep=True) == []

    damaged = min(before)
    shutil.rmtree(old / "home/stores/tiny-grows/shards" / damaged / "input_ids")
    with pytest.raises(CorruptError, match="eyas repair"):
        store.require_present(store.snapshot())
    repaired = repair_flow(**recipe(old))
    assert repaired.remade == (damaged,)
    assert store.commit(damaged).format_version == 3
    assert verify_store(store, deep=True) == []
    names = set(store.root.sizes(f"shards/{damaged}"))
    assert names == set(store.commit(damaged).objects), "the old objects went"

    gc_flow(**recipe(old), older_than_hours=0, delete=True)
    assert verify_store(store, deep=True) == []
    assert committed_samples(store) >= {
        store.snapshot().sample_id(row) for row in range(store.snapshot().num_samples)
    }
