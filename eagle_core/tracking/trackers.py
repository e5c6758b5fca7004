"""The trackers that a recipe selects, as one tracker."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec

from eagle_core.errors import ConfigError
from eagle_core.tracking.config import PACKAGES, TrackedRun, TrackerName, TrackingConfig
from eagle_core.tracking.metrics_file import MetricsFile
from eagle_core.tracking.tracker import Tracker


def require_trackers(config: TrackingConfig) -> None:
    """Raise ConfigError unless the packages of the selected trackers are installed."""
    for name in config.trackers:
        if name in PACKAGES and not _is_installed(name):
            raise ConfigError(
                f"tracker {name} needs a package that is not installed: run "
                f"`pip install -c constraints.txt {PACKAGES[name]}`, or remove it from "
                "tracking.trackers"
            )


def _is_installed(module: str) -> bool:
    spec = find_spec(module)
    # A run's folder `wandb` or `mlflow` looks like a package, but has no origin.
    return spec is not None and spec.origin is not None


@contextmanager
def open_trackers(config: TrackingConfig, run: TrackedRun) -> Iterator[Tracker]:
    """Yield one tracker that records with the selected ones and in the run's metrics file.

    Raises:
        ConfigError: a package is missing, or its service cannot be reached or denies access.

    """
    require_trackers(config)
    with ExitStack() as stack:
        selected = [stack.enter_context(_open(name, config, run)) for name in config.trackers]
        yield _All([stack.enter_context(MetricsFile(run.path)), *selected])


def _open(
    name: TrackerName, config: TrackingConfig, run: TrackedRun
) -> AbstractContextManager[Tracker]:
    """Open a tracker with `open_tracker` from the module of its name in this package."""
    module = importlib.import_module(f"{__package__}.{name}")
    opener: Callable[..., AbstractContextManager[Tracker]] = module.open_tracker
    return opener(config, run)


class _All:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record `scalars` at `step` in each."""
        for tracker in self._trackers:
            tracker.log(scalars, step=step)
