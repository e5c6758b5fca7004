"""A target's tokenizer, and what its files say about where an answer ends."""

import json
import shutil
from pathlib import Path

import pytest

from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer, declared_stop_ids
from eagle_core.tokenization.config import TemplateConfig
from tests import tiny


@pytest.fixture
def folder(tiny_target_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_target_path, tmp_path / "target")


def change(path: Path, **fields: object) -> None:
    own = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(own | fields))


def target(folder: Path) -> TargetConfig:
    return TargetConfig(name="tiny", model=str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("generation", "model", "text", "expected"),
    [
        (2, 3, None, {2, 3}),
        ([2, 5], None, None, {2, 5}),
        (None, [7], 8, {7, 8}),
        (None, None, None, set()),
    ],
)
def test_all_files_are_asked(
    folder: Path, generation: object, model: object, text: object, expected: set[int]
) -> None:
    change(folder / "generation_config.json", eos_token_id=generation)
    change(folder / "config.json", eos_token_id=model, text_config={"eos_token_id": text})
    assert declared_stop_ids(folder) == expected


def test_without_any_declaration_no_default_of_the_architecture_is_taken(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    own = json.loads((folder / "config.json").read_text())
    own.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(own))
    assert declared_stop_ids(folder) == frozenset()


@pytest.mark.parametrize("stops", [[0], None, "no file"])
def test_an_answer_ends_where_the_template_ends_it_whatever_is_declared(
    folder: Path, stops: object
) -> None:
    """`generation_config.json` with end-of-text only, without stop tokens, or not there at all."""
    path = folder / "generation_config.json"
    if stops == "no file":
        path.unlink()
    else:
        change(path, eos_token_id=stops)
    change(folder / "config.json", eos_token_id=None)
    change(folder / "tokenizer_config.json", eos_token=None)
    tokenizer = conversation_tokenizer(target(folder))
    end_of_turn = tokenizer._backend.token_to_id("<|im_end|>")
    assert end_of_turn in tokenizer.stop_ids
    assert "an answer ends with <|im_end|>; a server stops on" in tokenizer.ends_text()
    assert tokenizer.stop_ids - {0} == {end_of_turn}
    assert tokenizer.stop_ids <= set(tokenizer.special_token_ids())


@pytest.mark.parametrize("content", ["{cut", "[1]"])
def test_a_damaged_file_is_named(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json .*download it again"):
        declared_stop_ids(folder)


@pytest.mark.parametrize("content", ["{cut", '{"model": {"type": "Nothing"}}', ""])
def test_a_tokenizer_that_cannot_be_loaded_is_named(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"target tiny: the tokenizer in .* cannot be loaded"):
        conversation_tokenizer(target(folder))


def test_it_is_made_once_until_a_file_changes(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(tiny.CHAT_TEMPLATE)
    own = target(folder)
    given = own.model_copy(update={"template": TemplateConfig(chat_template=str(template))})
    first, first_given = conversation_tokenizer(own), conversation_tokenizer(given)
    assert conversation_tokenizer(own) is first
    assert conversation_tokenizer(given) is first_given is not first
    change(folder / "generation_config.json", eos_token_id=[0, 1])
    second = conversation_tokenizer(own)
    assert second.stop_ids == first.stop_ids | {0, 1}
    template.write_text("{{ bos_token or '' }}" + tiny.CHAT_TEMPLATE)
    second_given = conversation_tokenizer(given)
    assert second_given.template_fingerprint != first_given.template_fingerprint
