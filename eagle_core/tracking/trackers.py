"""The trackers that a recipe chose, as one."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec

from eagle_core.errors import ConfigError
from eagle_core.tracking.config import PACKAGES, TrackedRun, TrackerName, TrackingConfig
from eagle_core.tracking.metrics_file import MetricsFile
from eagle_core.tracking.tracker import Tracker


def require_trackers(config: TrackingConfig) -> None:
    """Raise ConfigError unless the packages of the chosen trackers are installed."""
    for name in config.trackers:
        if name in PACKAGES and not _is_installed(name):
            raise ConfigError(
                f"tracker {name} needs a package that is not installed: run "
                f"`pip install -c constraints.txt {PACKAGES[name]}`, or take it out of "
                "tracking.trackers"
            )


def _is_installed(module: str) -> bool:
    spec = find_spec(module)
    # The folder `wandb` or `mlflow` of some run looks like a package, one without an origin.
    return spec is not None and spec.origin is not None


@contextmanager
def open_trackers(config: TrackingConfig, run: TrackedRun) -> Iterator[Tracker]:
    """Yield one tracker that passes everything on to the chosen ones, and to the run's own file.

    Raises:
        ConfigError: a package is missing, or its service cannot be reached or refuses us.

    """
    require_trackers(config)
    with ExitStack() as stack:
        chosen = [stack.enter_context(_open(name, config, run)) for name in config.trackers]
        yield _All([stack.enter_context(MetricsFile(run.path)), *chosen])


def _open(
    name: TrackerName, config: TrackingConfig, run: TrackedRun
) -> AbstractContextManager[Tracker]:
    """Open the tracker of this name: `open_tracker` in the module of this name beside this one."""
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
