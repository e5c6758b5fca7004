"""A converted target is known by everything that its converter reads."""

import json
from pathlib import Path

import pytest

from eagle_core.errors import ConfigError
from eagle_core.serving.llamacpp import gguf, installed
from eagle_core.target.config import TargetConfig
from tests.tiny import write_target

CONVERTER = """\
import sys
from pathlib import Path
if "--fail" in Path(sys.argv[1]).name:
    print("architecture not supported"); sys.exit(1)
Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target's folder, and a converter that writes down what it is given."""
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    source = installed.folder() / "source"
    source.mkdir(parents=True)
    (source / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return write_target(tmp_path / "target")


def target(weights: Path, **settings: object) -> TargetConfig:
    """Return a target with these weights."""
    return TargetConfig(name="tiny", model=str(weights), dtype="float32", **settings)


def test_a_target_is_converted_once(weights: Path) -> None:
    path = gguf.target_file(target(weights), weights)
    assert path.name.startswith("tiny-f32-")
    assert "--outtype f32" in path.read_text()
    path.write_text("kept")
    assert gguf.target_file(target(weights), weights).read_text() == "kept"
    half = target(weights).model_copy(update={"dtype": "bfloat16"})
    assert gguf.target_file(half, weights).name.startswith("tiny-bf16-")


def test_another_tokenizer_is_another_file(weights: Path) -> None:
    before = gguf.target_file(target(weights), weights)
    settings = weights / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "extra": 1}))
    gguf._digest.cache_clear()  # of this process
    assert gguf.target_file(target(weights), weights) != before


def test_code_beside_weights_is_not_run_unless_it_is_trusted(weights: Path) -> None:
    config = weights / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"A": "b.C"}}))
    with pytest.raises(ConfigError, match=r"set target\.trust_remote_code if you trust it"):
        gguf.target_file(target(weights), weights)
    trusted = target(weights, trust_remote_code=True)
    assert gguf.target_file(trusted, weights).exists()


def test_what_the_converter_refuses_leaves_no_file(weights: Path, tmp_path: Path) -> None:
    refused = weights.rename(tmp_path / "--fail")
    with pytest.raises(ConfigError, match=r"refuses .*--fail:\n  architecture not supported"):
        gguf.target_file(target(refused), refused)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
