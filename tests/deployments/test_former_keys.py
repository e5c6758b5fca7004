"""Keys of a recipe that have another name now: the former one is read, with a warning."""

import json
from pathlib import Path

import pytest
from prefect.utilities.schema_tools.validation import ValidationError, validate
from pydantic import BaseModel

from deployments.recipe import Recipe, load_recipe
from eagle_core.config_model import ConfigModel
from eagle_core.draft.settings import DraftSettings
from eagle_core.errors import ConfigError
from eagle_core.training.config import TrainingConfig
from flows.bridge.run import Run, write_run
from flows.config.store import StoreConfig

FORMER_KEYS = {
    "runner.silence_seconds": "runner.inactivity_timeout_seconds",
    "training.start_from": "training.start",
}
"""All of them, so that none is dropped or added unseen."""
MOVED_KEYS = {
    "training.fc_norm": "draft.fc_norm",
    "training.norm_output": "draft.norm_output",
}
"""Keys that are in another section now."""


def _sections(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    found = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= {f"{prefix}{name}": kind, **_sections(kind, f"{prefix}{name}.")}
    return found


def test_the_former_keys_are_these() -> None:
    found: dict[str, str] = {}
    moved: dict[str, str] = {}
    for section, model in _sections(Recipe).items():
        assert issubclass(model, ConfigModel), section
        for former, now in model.former_keys.items():
            assert now in model.model_fields
            assert former not in model.model_fields
            found[f"{section}.{former}"] = f"{section}.{now}"
        moved |= {f"{section}.{key}": now for key, now in model.moved_keys.items()}
    assert found == FORMER_KEYS
    assert moved == MOVED_KEYS


@pytest.mark.parametrize(("key", "now"), MOVED_KEYS.items())
def test_a_key_that_moved_counts_in_its_new_section_with_a_warning(
    key: str, now: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe("smollm2", [f"{key}=true"])
    (message,) = caplog.messages
    assert message.startswith(f"the key {key.partition('.')[2]} is now {now};")
    name = now.removeprefix("draft.")
    assert recipe.draft == DraftSettings.model_validate({name: True})
    assert key.partition(".")[2] not in recipe.training.model_dump()
    again = Recipe.model_validate(recipe.model_dump(mode="json"))  # as a deployment has it
    assert again.draft == recipe.draft


@pytest.mark.parametrize(("former", "now"), FORMER_KEYS.items())
def test_a_former_key_is_read_with_a_warning(
    former: str, now: str, caplog: pytest.LogCaptureFixture
) -> None:
    section, _, key = now.partition(".")
    value = getattr(getattr(load_recipe("smollm2"), section), key)
    other = value + 1 if isinstance(value, float) else f"{value}2"
    assert caplog.text == ""
    recipe = load_recipe("smollm2", [f"{former}={other}"])
    assert getattr(getattr(recipe, section), key) == other
    (message,) = caplog.messages
    assert message.startswith(f"the key {former.partition(chr(46))[2]} is now called {key};")


def test_a_run_of_an_older_version_has_the_settings_of_its_draft() -> None:
    training = TrainingConfig.model_validate({"norm_output": True})
    older = Run.model_construct(draft_settings=None, training=training)
    assert older.settings_of_draft == DraftSettings(norm_output=True)
    own = DraftSettings(num_hidden_layers=2)
    assert older.model_copy(update={"draft_settings": own}).settings_of_draft == own


def test_a_run_of_an_older_version_keeps_the_settings_of_its_draft(tmp_path: Path) -> None:
    training = TrainingConfig.model_validate({"fc_norm": True})
    older = Run.model_construct(draft_settings=None, training=training)
    now = Run.model_construct(training=TrainingConfig(), store=StoreConfig(), tracking=None)
    write_run(tmp_path, now, begun=older)
    assert json.loads((tmp_path / "run.json").read_text())["draft_settings"]["fc_norm"] is True


def test_a_server_accepts_former_keys_in_stored_parameters() -> None:
    """Deployments that were registered anew check the parameters of old schedules and triggers."""
    schema = Recipe.model_json_schema()
    document = load_recipe("smollm2").model_dump(mode="json")
    for former, now in FORMER_KEYS.items():
        section, _, key = now.partition(".")
        value = document[section].pop(key)
        document[section][former.partition(".")[2]] = value
    for key in MOVED_KEYS:
        document[key.partition(".")[0]][key.partition(".")[2]] = True
    validate(document, schema, raise_on_error=True)
    for former in FORMER_KEYS:
        section, _, key = former.partition(".")
        document[section][f"{key}s"] = document[section].pop(key)
    with pytest.raises(ValidationError, match=r"not match any of the regexes"):
        validate(document, schema, raise_on_error=True)


def test_a_key_under_both_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="both inactivity_timeout_seconds and its former name"):
        load_recipe("smollm2", ["runner.silence_seconds=5", "runner.inactivity_timeout_seconds=6"])
