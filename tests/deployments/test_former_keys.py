"""Keys of a recipe that have another name now: the former one is read, with a warning."""

import pytest
from pydantic import BaseModel

from deployments.recipe import Recipe, load_recipe
from eagle_core.config_model import ConfigModel
from eagle_core.errors import ConfigError

FORMER_KEYS = {
    "runner.silence_seconds": "runner.inactivity_timeout_seconds",
}
"""All of them, so that none is dropped or added unseen."""


def _sections(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    found = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= {f"{prefix}{name}": kind, **_sections(kind, f"{prefix}{name}.")}
    return found


def test_the_former_keys_are_these() -> None:
    found: dict[str, str] = {}
    for section, model in _sections(Recipe).items():
        assert issubclass(model, ConfigModel), section
        for former, now in model.former_keys.items():
            assert now in model.model_fields
            assert former not in model.model_fields
            found[f"{section}.{former}"] = f"{section}.{now}"
    assert found == FORMER_KEYS


@pytest.mark.parametrize(("former", "now"), FORMER_KEYS.items())
def test_a_former_key_is_read_with_a_warning(
    former: str, now: str, caplog: pytest.LogCaptureFixture
) -> None:
    section, _, key = now.partition(".")
    value = getattr(getattr(load_recipe("smollm2"), section), key)
    assert caplog.text == ""
    recipe = load_recipe("smollm2", [f"{former}={value + 1}"])
    assert getattr(getattr(recipe, section), key) == value + 1
    (message,) = caplog.messages
    assert message.startswith(f"{former} is now called {key}")


def test_a_key_under_both_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="both inactivity_timeout_seconds and its former name"):
        load_recipe("smollm2", ["runner.silence_seconds=5", "runner.inactivity_timeout_seconds=6"])
