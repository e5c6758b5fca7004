"""Layout gguf: what llama.cpp cannot run is refused, and nothing is left."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from eagle_core.draft.export import ServedTarget
from eagle_core.draft.export_config import ExportConfig
from eagle_core.errors import ConfigError
from eagle_core.serving.llamacpp import installed
from eagle_core.serving.llamacpp.draft_file import export_gguf
from tests.eagle_core.draft.test_export import make_draft
from tests.eagle_core.serving.llamacpp.test_gguf import CONVERTER


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converter that writes down what it is given."""
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    path = installed.folder() / "source" / "convert_hf_to_gguf.py"
    path.parent.mkdir(parents=True)
    path.write_text(CONVERTER)
    return path


def write(target: Path, folder: Path, *, norms: bool = False) -> Path:
    """Write the file of a draft of the tiny target."""
    served = ServedTarget.of(
        AutoConfig.from_pretrained(target), name_or_path="tiny", aux_layers=(1, 3, 4)
    )
    draft = make_draft(target, norms=norms)
    return export_gguf(draft, served, folder, ExportConfig(), weights=target)


def test_the_converter_gets_the_draft_and_its_target(
    converter: Path, tiny_target_path: Path, tmp_path: Path
) -> None:
    assert converter.exists()
    folder = write(tiny_target_path, tmp_path / "export")
    assert [path.name for path in folder.iterdir()] == ["draft.gguf"]
    given = (folder / "draft.gguf").read_text()
    assert f"--outtype bf16 --target-model-dir {tiny_target_path}" in given


def test_other_files_in_the_folder_stay(
    converter: Path, tiny_target_path: Path, tmp_path: Path
) -> None:
    assert converter.exists()
    folder = write(tiny_target_path, tmp_path / "export")
    (folder / "target.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="files that no export wrote"):
        write(tiny_target_path, tmp_path / "export")
    assert (folder / "target.gguf").read_text() == "mine"


def test_norms_that_llamacpp_would_leave_out_are_refused(
    converter: Path, tiny_target_path: Path, tmp_path: Path
) -> None:
    assert converter.exists()
    with pytest.raises(ConfigError, match=r"has no fc_norm and norm_output.*choose vLLM"):
        write(tiny_target_path, tmp_path / "export", norms=True)
    assert not (tmp_path / "export").exists()


def test_without_a_converter_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tiny_target_path: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="run `eyas engines install llamacpp`"):
        write(tiny_target_path, tmp_path / "export")
    assert not (tmp_path / "export").exists()
