"""What starts automatically: checking for new data, computing its states, training on them."""

from typing import Any

from pydantic import Field

from eagle_core.config_model import ConfigModel
from flows.orchestration.event_names import (
    DATASET_CHANGED,
    SNAPSHOT_PUBLISHED,
    dataset_resource,
    store_resource,
)
from flows.workspace import DEFAULT_HOME


class AutomationConfig(ConfigModel):
    """Section of a recipe; nothing starts automatically unless the recipe enables it."""

    watch_cron: str | None = Field(
        default=None,
        pattern=r"^\S+( \S+){4}$",
        description="When `watch` checks for new data, as five cron fields in UTC: `0 * * * *`.",
    )
    on_new_data: bool = Field(
        default=False, description="Start hidden-states when `watch` has found new data."
    )
    home: str = Field(
        default=DEFAULT_HOME,
        description="Folder for data, stores and runs of the flows that a server starts, as seen "
        "by its workers; `eyas run` takes --home.",
    )
    train_on_snapshot: bool = Field(
        default=False,
        description="Start train when hidden-states has published a snapshot; each snapshot gets a "
        "separate run.",
    )


def schedules(flow: str, config: AutomationConfig) -> list[dict[str, Any]]:
    """Return the schedules of a flow's deployment, as prefect.yaml writes them."""
    if flow != "watch" or config.watch_cron is None:
        return []
    return [{"cron": config.watch_cron, "timezone": "UTC"}]


def triggers(
    flow: str, config: AutomationConfig, *, target: str, dataset: str
) -> list[dict[str, Any]]:
    """Return the triggers of a flow's deployment, as prefect.yaml writes them."""
    if flow == "hidden-states" and config.on_new_data:
        return [
            {
                "name": f"hidden states of {target}: {dataset} has changed",
                "type": "event",
                "expect": [DATASET_CHANGED],
                "match": {"prefect.resource.id": dataset_resource(dataset)},
            }
        ]
    if flow == "train" and config.train_on_snapshot:
        published = "{{ event.payload.snapshot_id }}"
        return [
            {
                "name": f"train {target}: a snapshot of {dataset} is published",
                "type": "event",
                "expect": [SNAPSHOT_PUBLISHED],
                "match": {"prefect.resource.id": store_resource(target, dataset)},
                "parameters": {"run": published, "snapshot_id": published},
            }
        ]
    return []
