"""One small pipeline: a tiny target, a small data set, and the settings that go with them."""

from pathlib import Path

import pytest

from eagle_core.dataset_config import DatasetConfig
from eagle_core.target_config import TargetConfig
from flows.config import StoreConfig
from tests import tiny

NUM_CONVERSATIONS = 40


@pytest.fixture
def target(tiny_target_path: Path) -> TargetConfig:
    """The tiny target, in float32 on the CPU."""
    return TargetConfig(
        name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu", batch_tokens=512
    )


@pytest.fixture(scope="session")
def conversations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ShareGPT file of 40 conversations."""
    path = tmp_path_factory.mktemp("conversations") / "tiny.json"
    return tiny.write_conversations(path, NUM_CONVERSATIONS)


@pytest.fixture
def dataset(conversations_path: Path) -> DatasetConfig:
    """The small data set, a fifth of it held out."""
    return DatasetConfig(
        name="facts", source=str(conversations_path), held_out_fraction=0.2, max_length=256
    )


@pytest.fixture
def store() -> StoreConfig:
    """Shards of a few samples, four to a task."""
    return StoreConfig(shard_tokens=600, shards_per_task=4)
