"""What starts by itself is off, and starts exactly what the recipe says once it is on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import prefect_yaml, recipe
from deployments.automation import AutomationConfig, schedules, triggers
from deployments.recipe import load_recipe, recipe_names
from eagle_core.errors import ConfigError
from flows.orchestration.event_names import DATASET_CHANGED, SNAPSHOT_PUBLISHED

EVERYTHING = AutomationConfig(watch_cron="0 * * * *", on_new_data=True, train_on_snapshot=True)


def starts(flow: str, config: AutomationConfig) -> list[dict[str, Any]]:
    return triggers(flow, config, target="tiny", dataset="facts")


@pytest.mark.parametrize("name", recipe_names())
def test_nothing_that_ships_starts_by_itself(name: str) -> None:
    assert load_recipe(name).automation == AutomationConfig()


def test_new_data_starts_the_hidden_states_of_that_data_set() -> None:
    (trigger,) = starts("hidden-states", EVERYTHING)
    assert trigger["expect"] == [DATASET_CHANGED]
    assert trigger["match"] == {"prefect.resource.id": "eyas.dataset.facts"}
    assert not starts("hidden-states", AutomationConfig(train_on_snapshot=True))


def test_a_snapshot_starts_a_training_of_its_own() -> None:
    (trigger,) = starts("train", EVERYTHING)
    assert trigger["expect"] == [SNAPSHOT_PUBLISHED]
    assert trigger["match"] == {"prefect.resource.id": "eyas.store.tiny-facts"}
    published = "{{ event.payload.snapshot_id }}"
    assert trigger["parameters"] == {"run": published, "snapshot_id": published}
    assert not starts("train", AutomationConfig(on_new_data=True))


def test_only_watch_has_a_schedule() -> None:
    assert schedules("watch", EVERYTHING) == [{"cron": "0 * * * *", "timezone": "UTC"}]
    assert not schedules("watch", AutomationConfig())
    assert not schedules("hidden-states", EVERYTHING)


@pytest.mark.parametrize("cron", ["hourly", "0 * * *", "0 0 * * * *"])
def test_a_schedule_has_five_fields(cron: str) -> None:
    with pytest.raises(ConfigError, match=r"automation\.watch_cron"):
        load_recipe("smollm2", [f"automation.watch_cron='{cron}'"])


def test_recipes_of_one_data_set_share_its_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cron in (("one", None), ("two", "0 * * * *"), ("three", "0 * * * *")):
        document: dict[str, Any] = {
            "target": {"name": name, "model": name},
            "dataset": {"name": "chats", "source": "chats.jsonl"},
            "automation": {"watch_cron": cron},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    rendered = yaml.safe_load(prefect_yaml.render())["deployments"]
    watches = [one for one in rendered if one["entrypoint"].startswith("flows/watch.py")]
    assert [one["name"] for one in watches] == ["chats"]
    assert watches[0]["schedules"] == [{"cron": "0 * * * *", "timezone": "UTC"}]
    assert all("schedules" not in one for one in rendered if one is not watches[0])


def test_what_a_server_starts_lies_where_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An automation's action passes the run on, and no home."""
    document = {
        "target": {"name": "big", "model": "big"},
        "dataset": {"name": "chats", "source": "chats.jsonl"},
        "automation": {"home": "/mnt/big/eyas", "train_on_snapshot": True},
    }
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    rendered = yaml.safe_load(prefect_yaml.render())["deployments"]
    assert {one["parameters"]["home"] for one in rendered} == {"/mnt/big/eyas"}
    assert len(rendered) > 10
