"""`watch`: sends an event if the source has changed since the data set was built.

It compares with the data set, not with its previous report: every check reports a change until a
flow has rebuilt the data set, so that a lost event costs one interval.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.data.manifest import MANIFEST_NAME, load_manifest
from eagle_core.data.sources import source_identity
from eagle_core.errors import ConfigError
from flows.orchestration.event_names import DATASET_CHANGED, dataset_resource
from flows.orchestration.events import send
from flows.orchestration.retry import is_transient
from flows.orchestration.run_name import run_name
from flows.workspace import DEFAULT_HOME, Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceChange:
    """What a data set was built from, and what its source holds now."""

    built_from: tuple[str, ...]
    """One line per file (name and content), or the hub's commit; empty if never built."""
    found: tuple[str, ...]

    @property
    def new(self) -> tuple[str, ...]:
        """The lines that did not exist when the data set was built."""
        return tuple(line for line in self.found if line not in set(self.built_from))


@flow(name="watch", flow_run_name=run_name("watch-{dataset.name}"), persist_result=False)
def watch(dataset: DatasetConfig, home: str = DEFAULT_HOME) -> SourceChange | None:
    """Send an event if the data set's source has changed; return the change.

    Raises:
        ConfigError: there is no source (any more), or access to the hub is not allowed.
        TransientError: the source could not be reached in three attempts.

    """
    change = check_source(dataset, Workspace.at(home, target="", dataset=dataset.name))
    log = get_run_logger()
    if change is None:
        log.info("%s has not changed since the data set was built", dataset.origin)
        return None
    log.info("%s has changed: %s", dataset.origin, "; ".join(change.new) or "entries were removed")
    send(
        DATASET_CHANGED,
        resource=dataset_resource(dataset.name),
        payload={"built_from": change.built_from, "found": change.found},
    )
    return change


@task(
    task_run_name="source of {dataset.name}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def check_source(dataset: DatasetConfig, space: Workspace) -> SourceChange | None:
    """Compare the source with what the data set was built from: content, not dates."""
    if dataset.source == REGENERATED:
        raise ConfigError(
            f"data set {dataset.name} holds answers of a target and has no source; watch the "
            "data set of its questions"
        )
    found = source_identity(dataset)
    is_built = (space.dataset_path / MANIFEST_NAME).is_file()
    built_from = load_manifest(space.dataset_path).source if is_built else ()
    if found == built_from:
        return None
    return SourceChange(built_from=_lines(built_from), found=_lines(found))


def _lines(source: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(" ".join(str(value) for value in item.values()) for item in source)
