"""SwanLab: offline below `RUN/swanlab`, to send with `swanlab sync`."""

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager

from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.hosted import HostedTracker, hosted_run_id
from eagle_core.tracking.tracker import Tracker


class _SwanLabTracker(HostedTracker):
    """SwanLab: offline below `RUN/swanlab`, to send with `swanlab sync`."""

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


def open_tracker(config: TrackingConfig, run: TrackedRun) -> AbstractContextManager[Tracker]:
    """Return the tracker; raise ConfigError if it cannot be opened."""
    return _SwanLabTracker(config, run)
