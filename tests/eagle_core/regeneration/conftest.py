"""Data sets of questions."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from eagle_core.data.build import build_dataset
from eagle_core.data.config import DatasetConfig
from tests.eagle_core.regeneration.runs import Make


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """Build a data set of records, a fifth of it held out."""

    def make(records: Sequence[object], *, name: str = "questions") -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        config = DatasetConfig(name=name, source=str(path), held_out_fraction=0.2)
        build_dataset(config, out_dir=tmp_path / name)
        return tmp_path / name

    return make
