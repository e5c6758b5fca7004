"""Weights & Biases: offline below `RUN/wandb`, to send with `wandb sync`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.hosted import HostedTracker, hosted_run_id
from eagle_core.tracking.tracker import Tracker

_DECODED_STEP = "decoding/step"
"""Horizontal axis of what is decoded in the background, and known only some steps later."""


class _WandbTracker(HostedTracker):
    """Weights & Biases: offline below `RUN/wandb`, to send with `wandb sync`."""

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
        self._newest = int(self._run.step)  # of a run that is resumed online: after its last one
        self._run.define_metric("decoding/*", step_metric=_DECODED_STEP)

    def _send(self, scalars: Mapping[str, float], step: int) -> None:
        """Send metrics; what is decoded late goes beside the newest ones, or W&B would drop it.

        Other metrics of an earlier step are of one that is repeated after a kill: W&B has them.
        """
        sent = dict(scalars)
        if any(name.startswith("decoding/") for name in scalars):
            sent[_DECODED_STEP] = step
            step = max(step, self._newest)
        self._newest = max(self._newest, step)
        self._run.log(sent, step=step)

    def _close(self, *, is_good: bool) -> None:
        self._run.finish(exit_code=0 if is_good else 1)


def open_tracker(config: TrackingConfig, run: TrackedRun) -> AbstractContextManager[Tracker]:
    """Return the tracker; raise ConfigError if it cannot be opened."""
    return _WandbTracker(config, run)
