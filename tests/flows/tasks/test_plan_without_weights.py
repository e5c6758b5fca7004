"""`plan` for a target whose weights are not here."""

import shutil
from pathlib import Path
from unittest import mock

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.memory.free_memory import MemoryShare
from eagle_core.target.weights import weight_files
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.plan import plan
from flows.reports.store_tables import cost_rows
from flows.tasks.preflight import TYPICAL_SHARES
from tests.eagle_core.target.test_preflight import change_config

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def described(target: TargetConfig, tmp_path: Path) -> TargetConfig:
    """The tiny target without its weights."""
    folder = tmp_path / "described"
    shutil.copytree(target.model, folder)
    for path in weight_files(folder):
        path.unlink()
    return target.model_copy(update={"model": str(folder)})


def test_it_is_estimated_from_its_description(
    tmp_path: Path,
    target: TargetConfig,
    described: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig,
) -> None:
    measured = plan(target=target, dataset=dataset, store=store, home=str(tmp_path / "a"))
    found = plan(target=described, dataset=dataset, store=store, home=str(tmp_path / "b"))
    assert found.is_sketch
    assert not measured.is_sketch
    assert found.missing_tokens == measured.missing_tokens
    assert found.num_shards == measured.num_shards
    assert found.bytes_per_token.keys() == measured.bytes_per_token.keys()
    for name, expected in measured.bytes_per_token.items():
        # A tiny target's shards are small: their headers and dictionaries weigh more.
        assert 0.5 < found.bytes_per_token[name] / expected < 1.2
    rows = dict(cost_rows(found))
    assert rows["weights"].startswith("not here: sizes are from config.json")
    assert rows["placement"].startswith("whole")
    assert found.tokens_per_second > 0
    with pytest.raises(ConfigError, match="hf download"):
        hidden_states(target=described, dataset=dataset, store=store, home=str(tmp_path / "b"))


def test_states_that_cannot_be_recomputed_are_not_offered(
    tmp_path: Path, described: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    home = str(tmp_path / "home")
    with mock.patch("flows.tasks.preflight.omitted_states", side_effect=ConfigError("no chain")):
        found = plan(target=described, dataset=dataset, store=store, home=home)
        assert set(found.bytes_per_token) == set(TYPICAL_SHARES)
        halved = store.model_copy(update={"recompute": True})
        with pytest.raises(ConfigError, match="no chain"):
            plan(target=described, dataset=dataset, store=halved, home=home)


def test_too_little_memory_leaves_the_time_open(
    tmp_path: Path, described: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    change_config(Path(described.model), quantization_config={"quant_method": "fp8"})
    little = MemoryShare(main=1)
    with mock.patch("flows.tasks.preflight.memory_share", return_value=little):
        found = plan(target=described, dataset=dataset, store=store, home=str(tmp_path / "home"))
    rows = dict(cost_rows(found))
    assert rows["time"] == "not known: cpu has too little memory for the target"
    assert "counted as if they were not" in rows["weights"]
    assert "the time is" not in rows["weights"]


def test_a_target_that_no_draft_can_be_made_for_is_refused(
    tmp_path: Path, described: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    with (
        mock.patch("flows.bridge.draft_setup.DraftConfig.from_target", side_effect=TypeError("?")),
        pytest.raises(ConfigError, match="no draft can be made for a llama model"),
    ):
        plan(target=described, dataset=dataset, store=store, home=str(tmp_path / "home"))
