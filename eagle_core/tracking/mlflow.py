"""MLflow: offline in `mlflow.db` next to the run's folder, to open with `mlflow ui`."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from pydantic import JsonValue

from eagle_core.errors import ConfigError
from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.hosted import HostedTracker, hosted_run_id
from eagle_core.tracking.tracker import Tracker

MLFLOW_STORE = "mlflow.db"
_RUN_TAG = "eyas.run"
_MLFLOW_VALUE_CHARACTERS = 6000


class _MlflowTracker(HostedTracker):
    """MLflow: offline in `mlflow.db` next to the run's folder, to open with `mlflow ui`."""

    name = "mlflow"
    quiet: ClassVar[Mapping[str, str]] = {"MLFLOW_DISABLE_TELEMETRY": "true"}

    def _failures(self) -> tuple[type[Exception], ...]:
        return (self._package.exceptions.MlflowException, OSError)

    def _open(self, config: TrackingConfig, run: TrackedRun) -> None:
        self._client = self._package.MlflowClient(tracking_uri=_mlflow_uri(config, run))
        experiment = self._client.get_experiment_by_name(config.project)
        experiment_id = (
            self._client.create_experiment(config.project)
            if experiment is None
            else experiment.experiment_id
        )
        self._run_id = self._same_run(experiment_id, run) or self._new_run(experiment_id, run)

    def _same_run(self, experiment_id: str, run: TrackedRun) -> str | None:
        """Return the id of the run of this name, set to running again, if there is one."""
        query = f"tags.`{_RUN_TAG}` = '{hosted_run_id(run.name)}'"
        found = self._client.search_runs([experiment_id], filter_string=query, max_results=1)
        if not found:
            return None
        run_id: str = found[0].info.run_id
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _new_run(self, experiment_id: str, run: TrackedRun) -> str:
        tags = {_RUN_TAG: hosted_run_id(run.name)}
        created = self._client.create_run(experiment_id, run_name=run.name, tags=tags)
        run_id: str = created.info.run_id
        for name, value in _flat(run.settings):
            self._client.log_param(run_id, name, str(value)[:_MLFLOW_VALUE_CHARACTERS])
        return run_id

    def _send(self, scalars: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metric = self._package.entities.Metric
        metrics = [metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _close(self, *, is_good: bool) -> None:
        self._client.set_terminated(self._run_id, status="FINISHED" if is_good else "FAILED")


def _mlflow_uri(config: TrackingConfig, run: TrackedRun) -> str:
    if config.mode == "offline":
        run.path.parent.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{(run.path.parent / MLFLOW_STORE).resolve()}"
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(
            "tracker mlflow with tracking.mode=online needs the server's address in the "
            "environment variable MLFLOW_TRACKING_URI; set it, or use tracking.mode=offline"
        )
    return uri


def _flat(settings: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def open_tracker(config: TrackingConfig, run: TrackedRun) -> AbstractContextManager[Tracker]:
    """Return the tracker; raise ConfigError if it cannot be opened."""
    return _MlflowTracker(config, run)
