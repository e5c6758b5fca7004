"""The training loop: exact, resumable, and ignorant of where its samples come from.

Invariant: a run interrupted after any checkpoint and resumed ends in the same bits as one that
never was. All that the next step depends on is in the checkpoint or a pure function of the step.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle_core import checkpoint
from eagle_core.checkpoint import Checkpoint
from eagle_core.draft import DraftModel
from eagle_core.errors import CorruptError
from eagle_core.held_out import measure_held_out
from eagle_core.loader import LoadedBatch, LoaderState, batches
from eagle_core.samples import SampleSource
from eagle_core.schedule import learning_rate
from eagle_core.stop_request import stop_request
from eagle_core.trackers import Tracker
from eagle_core.training_config import TrainingConfig
from eagle_core.ttt import TttOptions, TttOutcome, ttt_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the last step, and the last measurement on the held-out split, gave."""

    loss: float
    step_losses: tuple[float, ...]
    """[L] nats, by training-time-test step, on the last batch."""
    step_accuracies: tuple[float, ...]
    """[L] on the last batch."""
    first_loss: float
    """Of the very first step of the run."""
    held_out_accuracies: tuple[float, ...] = ()
    """[L]; empty without a held-out split."""
    held_out_acceptances: tuple[float, ...] = ()
    """[L] chance that a sampled draft token is accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Told after every step."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Where training ended."""

    num_steps: int
    """Steps of the run so far, earlier attempts included."""
    figures: Figures
    tokens_per_second: float
    """Of this attempt, data and checkpoints included; 0 when nothing was left to do."""
    checkpoint_path: Path
    stopped: bool
    """SIGTERM ended this attempt before the last step."""


def train(
    *,
    config: TrainingConfig,
    draft: DraftModel,
    target_lm_head: Tensor,
    source: SampleSource,
    held_out: SampleSource | None,
    run_path: Path,
    tracker: Tracker,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> TrainingResult:
    """Train `draft` in place, from the newest good checkpoint of `run_path` if there is one.

    Args:
        config: settings; all but the lengths must equal those of the checkpoint.
        draft: initialised draft on the device to train on.
        target_lm_head: [V, Ht] the target's head.
        source: training samples.
        held_out: samples to measure on, if any.
        run_path: folder of the run; checkpoints go below it.
        tracker: takes the figures.
        on_progress: called after every step.

    Raises:
        MismatchError: the checkpoint belongs to other data or settings; names the fields.
        CorruptError: the loss is not finite; names the samples of the batch.

    """
    run = _Run(config, draft, target_lm_head, source, held_out, run_path)
    with stop_request() as stop_asked:
        return run.until_done(tracker, on_progress, stop_asked.is_set)


class _Run:
    """One attempt at a run."""

    def __init__(
        self,
        config: TrainingConfig,
        draft: DraftModel,
        target_lm_head: Tensor,
        source: SampleSource,
        held_out: SampleSource | None,
        run_path: Path,
    ) -> None:
        self.config, self.draft, self.source, self.held_out = config, draft, source, held_out
        self.run_path = run_path
        self.target_head = target_lm_head[draft.t2d]
        self.options = TttOptions(
            ttt_length=config.ttt_length,
            step_decay=config.step_decay,
            loss_positions=config.loss_positions,
            loss_reduction=config.loss_reduction,
        )
        self.total_steps = config.total_steps(int(source.lengths.sum()))
        self.trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.identity = _identity(config, draft, source)
        self.step = 0
        self.loader = LoaderState(source_id=source.source_id, seed=config.seed)
        self.figures: Figures | None = None
        self.saved: Path | None = None
        self._resume()

    def _resume(self) -> None:
        folder = checkpoint.newest(self.run_path)
        if folder is None:
            return
        found = checkpoint.read(folder)
        checkpoint.require_identity(folder, found.identity, self.identity)
        checkpoint.load_weights(self.draft, folder)
        tensors = checkpoint.load_optimizer(folder)
        checkpoint.restore_optimizer(self.optimizer, self.draft, tensors)
        self.step, self.loader, self.saved = found.step, found.loader, folder
        self.figures = Figures(**{name: _as_tuple(value) for name, value in found.figures.items()})

    def until_done(
        self,
        tracker: Tracker,
        on_progress: Callable[[Progress], None],
        stop_asked: Callable[[], bool],
    ) -> TrainingResult:
        started, num_tokens = time.monotonic(), 0
        stream = batches(
            self.source,
            self.loader,
            window=self.config.shuffle_window,
            batch_tokens=self.config.batch_tokens,
        )
        while not self._is_done() and not stop_asked():
            waiting = time.monotonic()
            loaded = next(stream)
            waited = time.monotonic() - waiting
            num_tokens += loaded.batch.num_tokens
            outcome, rate = self._one_step(loaded)
            self._remember(outcome)
            on_progress(Progress(step=self.step, loss=outcome.loss.item()))
            if self.step % self.config.log_every == 0 or self._is_done():
                speed = num_tokens / (time.monotonic() - started)
                scalars = {"learning_rate": rate, "tokens_per_second": speed, "data_wait": waited}
                tracker.log({**_scalars(outcome), **scalars}, step=self.step)
            if self.step % self.config.held_out_every == 0 or self._is_done():
                self._measure(tracker)
            if self.step % self.config.checkpoint_every == 0 or self._is_done():
                self._save()
        stream.close()  # type: ignore[attr-defined]  # a generator
        if self.saved is None or checkpoint.read(self.saved).step != self.step:
            self._save()
        assert self.figures is not None  # noqa: S101 (at least one step is done)
        assert self.saved is not None  # noqa: S101
        return TrainingResult(
            num_steps=self.step,
            figures=self.figures,
            tokens_per_second=num_tokens / max(time.monotonic() - started, 1e-9),
            checkpoint_path=self.saved,
            stopped=not self._is_done(),
        )

    def _is_done(self) -> bool:
        if self.config.max_steps is not None:
            return self.step >= self.config.max_steps
        return self.loader.epoch >= self.config.epochs

    def _one_step(self, loaded: LoadedBatch) -> tuple[TttOutcome, float]:
        rate = learning_rate(self.config, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = loaded.batch.to(self.target_head.device)
        outcome = ttt_step(self.draft, batch, self.target_head, self.options)
        if not torch.isfinite(outcome.loss):
            raise CorruptError(
                f"step {self.step + 1}: the loss is {outcome.loss.item()} on samples "
                f"{', '.join(batch.sample_ids)}; verify the store, or lower the learning rate and "
                f"go on from {self.saved or 'the start'}"
            )
        outcome.loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.loader = loaded.after
        return outcome, rate

    def _remember(self, outcome: TttOutcome) -> None:
        before = self.figures
        self.figures = Figures(
            loss=outcome.loss.item(),
            step_losses=tuple(outcome.step_losses.tolist()),
            step_accuracies=tuple(_accuracies(outcome).tolist()),
            first_loss=outcome.loss.item() if before is None else before.first_loss,
            held_out_accuracies=() if before is None else before.held_out_accuracies,
            held_out_acceptances=() if before is None else before.held_out_acceptances,
        )

    def _measure(self, tracker: Tracker) -> None:
        if self.held_out is None or self.figures is None:
            return
        found = measure_held_out(
            self.draft,
            self.held_out,
            self.target_head,
            self.options,
            batch_tokens=self.config.batch_tokens,
            max_tokens=self.config.held_out_tokens,
        )
        self.figures = dataclasses.replace(
            self.figures,
            held_out_accuracies=found.accuracies,
            held_out_acceptances=found.acceptances,
        )
        named = {"accuracy": found.accuracies, "acceptance": found.acceptances}
        scalars = {
            f"held_out/{name}_{step}": value
            for name, values in named.items()
            for step, value in enumerate(values)
        }
        tracker.log(scalars, step=self.step)

    def _save(self) -> None:
        figures = {} if self.figures is None else dataclasses.asdict(self.figures)
        self.saved = checkpoint.save(
            self.run_path,
            Checkpoint(step=self.step, loader=self.loader, identity=self.identity, figures=figures),
            self.draft,
            checkpoint.optimizer_tensors(self.optimizer, self.draft),
            keep_last=self.config.keep_last,
        )


def _identity(config: TrainingConfig, draft: DraftModel, source: SampleSource) -> Mapping[str, Any]:
    vocabulary = draft.t2d.cpu().numpy().tobytes()
    return {
        "source_id": source.source_id,
        "training": config.identity(),
        "draft": draft.config.model_dump(mode="json"),
        "draft_vocabulary": hashlib.sha256(vocabulary).hexdigest(),
    }


def _as_tuple(value: Any) -> Any:  # noqa: ANN401 (a JSON value)
    return tuple(value) if isinstance(value, list) else value


def _accuracies(outcome: TttOutcome) -> Tensor:
    return outcome.step_correct / outcome.step_supervised.clamp(min=1)


def _scalars(outcome: TttOutcome) -> dict[str, float]:
    accuracies = _accuracies(outcome).tolist()
    losses = outcome.step_losses.tolist()
    return {
        "loss": outcome.loss.item(),
        **{f"loss/step_{step}": value for step, value in enumerate(losses)},
        **{f"accuracy/step_{step}": value for step, value in enumerate(accuracies)},
    }
