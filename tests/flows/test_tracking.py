"""The train flow keeps its figures where `tracking` says, whatever trains them."""

from pathlib import Path

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.tracking import trackers
from eagle_core.tracking.config import TrackingConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.offline import offline
from flows.train import train_flow

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(
    dtype="float32", draft_vocab_size=200, max_steps=2, batch_tokens=256, log_every=1
)


def test_a_run_keeps_the_curves_that_were_asked_for(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    hidden_states(target, dataset, store, home=str(tmp_path))
    for run, names in (("bright", ("tensorboard",)), ("dark", ())):
        tracking = TrackingConfig(trackers=names)  # type: ignore[arg-type]
        train_flow(target, dataset, store, TRAINING, tracking, home=str(tmp_path), run=run)
        events = list((tmp_path / "runs" / f"tiny-facts-{run}").glob("tensorboard/events.*"))
        assert len(events) == len(names)


@pytest.mark.skipif(trackers._is_installed("swanlab"), reason="SwanLab is installed")
def test_a_missing_package_is_known_before_any_state_is_computed(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    tracking = TrackingConfig(trackers=("swanlab",))
    with pytest.raises(ConfigError, match="tracker swanlab needs a package"):
        offline(target, dataset, store, training=TRAINING, tracking=tracking, home=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
