"""Weights & Biases, SwanLab and MLflow beside TensorBoard, one or several at once.

A package is imported only when its tracker is chosen. `offline` writes files and opens no
connection; `online` takes addresses and credentials from where each package looks for them (its
environment variables, its login file), never from a recipe. A run goes on in the hosted run of the
same name. A tracker that fails while a draft trains is given up with one warning: it never stops
training.
"""

import importlib
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from eagle_core.errors import ConfigError
from eagle_core.tracking.tracker import TENSORBOARD_FOLDER, TensorBoardTracker, Tracker

TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow"]
MLFLOW_STORE = "mlflow.db"
_RUN_TAG = "eyas.run"
_MLFLOW_VALUE_CHARACTERS = 6000
_PACKAGES = {"wandb": "wandb", "swanlab": "swanlab", "mlflow": "mlflow-skinny"}
"""Module to what pip installs."""

logger = logging.getLogger(__name__)


class TrackingConfig(BaseModel):
    """Where the figures of a training go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trackers: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="Any of tensorboard, wandb, swanlab and mlflow; none keeps no curves.",
    )
    project: str = Field(
        default="eyas", min_length=1, description="Project (MLflow: experiment) of the run."
    )
    mode: Literal["offline", "online"] = Field(
        default="offline",
        description="offline: files below the home folder, to sync or open later; online: the "
        "service, with the credentials that its package finds (WANDB_API_KEY or `wandb login`, "
        "SWANLAB_API_KEY or `swanlab login`, MLFLOW_TRACKING_URI).",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """The training whose figures are kept."""

    name: str
    path: Path
    """Its folder. MLflow's offline store lies beside it, so that runs can be compared."""
    settings: Mapping[str, JsonValue]
    """What it was made with."""


def require_trackers(config: TrackingConfig) -> None:
    """Raise ConfigError unless the packages of the chosen trackers are installed."""
    for name in config.trackers:
        if name in _PACKAGES and not _is_installed(name):
            raise ConfigError(
                f"tracker {name} needs a package that is not installed: run "
                f"`pip install -c constraints.txt {_PACKAGES[name]}`, or take it out of "
                "tracking.trackers"
            )


def _is_installed(module: str) -> bool:
    spec = find_spec(module)
    # The folder `wandb` or `mlflow` of some run looks like a package, one without an origin.
    return spec is not None and spec.origin is not None


@contextmanager
def open_trackers(config: TrackingConfig, run: TrackedRun) -> Iterator[Tracker]:
    """Yield one tracker that passes everything on to the chosen ones; close them at the end.

    Raises:
        ConfigError: a package is missing, or its service cannot be reached or refuses us.

    """
    require_trackers(config)
    with ExitStack() as stack:
        yield _All([stack.enter_context(_OPENERS[name](config, run)) for name in config.trackers])


def hosted_run_id(name: str) -> str:
    """Return an id that every service takes, the same whenever a run has the same name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:48]
    return plain if plain == name else f"{plain}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"


class _All:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step` in each."""
        for tracker in self._trackers:
            tracker.log(scalars, step=step)


class _HostedTracker(ABC):
    """A tracker of a package that may fail: on the way it is given up, at the start it may not."""

    name: ClassVar[str]
    quiet: ClassVar[Mapping[str, str]] = {}
    """Environment that turns a package's own telemetry off, unless the user set it."""
    failures: tuple[type[Exception], ...]
    """What the package raises on purpose, and what a lost connection looks like."""

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        self._is_lost = False
        for variable, value in self.quiet.items():
            os.environ.setdefault(variable, value)
        self._package: Any = importlib.import_module(self.name)
        self.failures = self._failures()
        try:
            self._open(config, run)
        except self.failures as error:
            raise ConfigError(
                f"tracker {self.name} cannot be opened: {_first_line(error)}. See to its login or "
                "address, set tracking.mode=offline, or take it out of tracking.trackers"
            ) from error

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step`, unless this tracker has failed before."""
        if self._is_lost:
            return
        try:
            self._send(scalars, step)
        except self.failures as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        """Return the tracker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is pending and say how the run ended."""
        if self._is_lost:
            return
        try:
            self._close(is_good=kind is None)
        except self.failures as failure:
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        self._is_lost = True
        logger.warning(
            "tracker %s failed (%s); training goes on without it", self.name, _first_line(error)
        )

    @abstractmethod
    def _failures(self) -> tuple[type[Exception], ...]: ...

    @abstractmethod
    def _open(self, config: TrackingConfig, run: TrackedRun) -> None: ...

    @abstractmethod
    def _send(self, scalars: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _close(self, *, is_good: bool) -> None: ...


class WandbTracker(_HostedTracker):
    """Weights & Biases: offline below `RUN/wandb`, to be sent by `wandb sync`."""

    name = "wandb"
    quiet: ClassVar[Mapping[str, str]] = {"WANDB_ERROR_REPORTING": "false"}

    def _failures(self) -> tuple[type[Exception], ...]:
        return (self._package.Error, OSError)  # its helper process may die: ConnectionResetError

    def _open(self, config: TrackingConfig, run: TrackedRun) -> None:
        is_online = config.mode == "online"
        run.path.mkdir(parents=True, exist_ok=True)
        self._run = self._package.init(
            project=config.project,
            id=hosted_run_id(run.name),
            name=run.name,
            dir=str(run.path),
            mode=config.mode,
            resume="allow" if is_online else None,  # offline parts of a run have the same id
            config=dict(run.settings),
            allow_val_change=True,
            settings=self._package.Settings(
                silent=not is_online, console="off", disable_git=True, disable_code=True
            ),
        )

    def _send(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def _close(self, *, is_good: bool) -> None:
        self._run.finish(exit_code=0 if is_good else 1)


class SwanLabTracker(_HostedTracker):
    """SwanLab: offline below `RUN/swanlab`, to be sent by `swanlab sync`."""

    name = "swanlab"

    def _failures(self) -> tuple[type[Exception], ...]:
        exceptions = importlib.import_module("swanlab.exceptions")
        return (RuntimeError, OSError, exceptions.AuthenticationError)

    def _open(self, config: TrackingConfig, run: TrackedRun) -> None:
        settings = self._package.Settings(
            interactive=False,
            terminal={"proxy_type": "none"},
            probe={"git": False, "requirements": False},
        )
        folder = run.path / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = self._package.init(
            project=config.project,
            id=hosted_run_id(run.name),
            name=run.name,
            log_dir=str(folder),
            mode=config.mode,
            resume="allow",
            config=dict(run.settings),
            settings=settings,
        )

    def _send(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def _close(self, *, is_good: bool) -> None:
        self._run.finish(state="success" if is_good else "crashed")


class MlflowTracker(_HostedTracker):
    """MLflow: offline in `mlflow.db` beside the run's folder, which `mlflow ui` opens."""

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
        """Return the id of the run of this name, running again, if there is one."""
        wanted = f"tags.`{_RUN_TAG}` = '{hosted_run_id(run.name)}'"
        found = self._client.search_runs([experiment_id], filter_string=wanted, max_results=1)
        if not found:
            return None
        run_id: str = found[0].info.run_id
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _new_run(self, experiment_id: str, run: TrackedRun) -> str:
        tags = {_RUN_TAG: hosted_run_id(run.name)}
        made = self._client.create_run(experiment_id, run_name=run.name, tags=tags)
        run_id: str = made.info.run_id
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _tensorboard(_config: TrackingConfig, run: TrackedRun) -> TensorBoardTracker:
    return TensorBoardTracker(run.path / TENSORBOARD_FOLDER)


_OPENERS: Mapping[
    TrackerName, Callable[[TrackingConfig, TrackedRun], AbstractContextManager[Tracker]]
] = {
    "tensorboard": _tensorboard,
    "wandb": WandbTracker,
    "swanlab": SwanLabTracker,
    "mlflow": MlflowTracker,
}
