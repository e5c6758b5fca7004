"""The file of a draft is known by what it was converted with."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig
from eagle_core.serving.llamacpp import gguf, installed
from eagle_core.serving.llamacpp.server import LlamaCppEngine, draft_path
from eagle_core.serving.served import Served
from eagle_core.target.config import TargetConfig
from tests.eagle_core.draft.test_export import make_draft
from tests.eagle_core.serving.llamacpp.test_gguf import CONVERTER
from tests.tiny import write_target


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A target with an export of its draft, and a llama.cpp that writes down what it is given."""
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    for path, text in (("source/convert_hf_to_gguf.py", CONVERTER), ("bin/llama-server", "")):
        (installed.folder() / path).parent.mkdir(parents=True)
        (installed.folder() / path).write_text(text)
    weights = write_target(tmp_path / "target")
    written = export(
        make_draft(weights),
        ServedTarget.of(
            AutoConfig.from_pretrained(weights), name_or_path="tiny", aux_layers=(1, 3, 4)
        ),
        tmp_path / "served",
        ExportConfig(layouts=("serving",)),
    )
    target = TargetConfig(name="tiny", model=str(weights), dtype="float32", device="cpu")
    return Served(
        target=target,
        weights=weights,
        draft=written["serving"],
        draft_tokens=2,
        max_length=64,
    )


def test_a_draft_is_converted_once(served: Served) -> None:
    engine = LlamaCppEngine(served.target)
    engine.prepare(served)
    path = draft_path(served)
    assert "--outtype f32" in path.read_text()
    path.write_text("kept")
    engine.prepare(served)
    assert path.read_text() == "kept"
    assert str(path) in engine.launch(served, port=1).command


def test_another_dtype_target_or_version_is_another_file(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = served.target.model_copy(update={"dtype": "bfloat16"})
    other = write_target(tmp_path / "other")
    (other / "tokenizer_config.json").write_text("{}")
    found = {
        draft_path(served),
        draft_path(replace(served, target=half)),
        draft_path(replace(served, weights=other)),
    }
    gguf._digest.cache_clear()  # of this process
    monkeypatch.setattr(gguf, "VERSION", "99999")
    found.add(draft_path(served))
    gguf._digest.cache_clear()
    assert len(found) == 4
    assert {path.parent for path in found} == {tmp_path / "served"}


def test_a_file_is_used_as_it_is(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.touch()
    assert draft_path(replace(served, draft=path)) == path
