"""The training loop: exact, resumable, and independent of the source of its samples.

Invariant: a run that is interrupted after any checkpoint and resumed ends bit-identical to an
uninterrupted one. Everything that the next step depends on is in the checkpoint or a pure function
of the step.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from eagle_core.bfloat16 import require_finite
from eagle_core.draft.model import DraftModel
from eagle_core.samples import SampleSource
from eagle_core.tracking.tracker import Tracker
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import Checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.decoded_points import read_points
from eagle_core.training.device_copies import device_copies
from eagle_core.training.distributed import Processes, join_processes, whole
from eagle_core.training.draft_decoding import Decoder, DraftDecoding
from eagle_core.training.loader import LoaderState, steps
from eagle_core.training.optimizer_step import OptimizerStep
from eagle_core.training.optimizers import restore_state, state_tensors
from eagle_core.training.pieces import Windows
from eagle_core.training.precision import dtype_name, multiplying_dtype
from eagle_core.training.result import Best, Metrics, Progress, TrainingResult
from eagle_core.training.schedule import (
    Decay,
    PlannedRun,
    RunSteps,
    learning_rate,
    new_decay,
    recorded_decay,
    resumed_decay,
    step_shape,
)
from eagle_core.training.stop_request import stop_request
from eagle_core.training.throughput import ThroughputMeter
from eagle_core.training.ttt import TttOutcome
from eagle_core.training.validation import held_out_batches, measure


def train(
    *,
    config: TrainingConfig,
    draft: DraftModel,
    target_lm_head: Tensor,
    source: SampleSource,
    held_out: SampleSource | None,
    run_path: Path,
    tracker: Tracker,
    decoder: Decoder | None = None,
    planned: PlannedRun | None = None,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> TrainingResult:
    """Train `draft` in place, from the newest good checkpoint of `run_path` if there is one.

    Under torchrun every process calls this; the first writes checkpoints, and only its tracker and
    callback should report anything.

    Args:
        config: settings; their `identity` must equal that of the checkpoint.
        draft: initialised draft on the device to train on, the same on all processes.
        target_lm_head: [V, Ht] the target's head, on any device.
        source: training samples.
        held_out: samples to measure on, if any.
        run_path: folder of the run; checkpoints go below it.
        tracker: records the metrics.
        decoder: of the first process: decodes with drafts of the run at `config.decode_every`.
        planned: what is known of the run, if its checkpoint is of an earlier version.
        on_progress: called after every step.

    Raises:
        ConfigError: `compile` needs FlexAttention, but its results are wrong on this GPU.
        MismatchError: the checkpoint belongs to other data or settings, which it names; or the run
            is longer than it was, and `config.extend` is not set.
        CorruptError: the loss or the gradient (names the samples of the batch) or a weight to save
            is not finite.
        EagleCoreError: `decoder` failed; all steps before are saved.

    """
    with join_processes() as processes, stop_request() as stop_requested:
        # Not assigned: objects that hold a process group must be gone when the block ends.
        return _Run(
            config, draft, target_lm_head, source, held_out, run_path, processes, planned
        ).until_done(tracker, decoder, on_progress, stop_requested.is_set)


class _Run:
    """One attempt at a run, in one of its processes."""

    def __init__(
        self,
        config: TrainingConfig,
        draft: DraftModel,
        target_lm_head: Tensor,
        source: SampleSource,
        held_out: SampleSource | None,
        run_path: Path,
        processes: Processes,
        planned: PlannedRun | None,
    ) -> None:
        self.config, self.draft, self.source, self.held_out = config, draft, source, held_out
        self.run_path, self.processes = run_path, processes
        self.windows = Windows.of(config, draft.config)
        self.dtype = multiplying_dtype(config.dtype, draft.lm_head.weight.device)
        self.identity = _identity(config, draft, source, self.dtype)
        self.step = 0
        self.loader = LoaderState(source_id=source.source_id, seed=config.seed)
        self.metrics: Metrics | None = None
        self.saved: Path | None = None
        self.best_length = 0.0
        """Largest held-out length of the existing checkpoints."""
        self.decay = self._resume_weights(planned)
        target_head = draft.draft_rows(target_lm_head, self.dtype)
        self.optimizer_step = OptimizerStep(
            config, draft, target_head, source, self.windows, processes
        )
        self.optimizers = self.optimizer_step.optimizers
        if self.saved is not None:
            restore_state(self.optimizers, draft, checkpoint.load_optimizer(self.saved))

    def _resume_weights(self, planned: PlannedRun | None) -> Decay:
        """Load the weights of the newest checkpoint; return the decay of the learning rate."""
        steps_of_run = RunSteps(
            config=self.config,
            lengths=self.source.lengths,
            groups=self.source.groups,
            windows=self.windows,
            world_size=self.processes.world_size,
        )
        folder = checkpoint.newest(self.run_path)
        if folder is None:
            return new_decay(steps_of_run)
        found = checkpoint.read(folder)
        checkpoint.require_identity(folder, found.identity, self.identity)
        here = dataclasses.replace(steps_of_run, step=found.step, loader=found.loader)
        before = found.decay or recorded_decay(here, planned)
        decay = resumed_decay(here, before)
        self.processes.wait()  # all have read it
        is_known = planned is not None or found.step < here.last()
        if found.decay is None and is_known and self.processes.is_first:
            checkpoint.add_decay(folder, before)
        checkpoint.load_weights(self.draft, folder)
        self.step, self.loader, self.saved = found.step, found.loader, folder
        self.metrics = TypeAdapter(Metrics).validate_python(found.figures)
        best = checkpoint.find_best(self.run_path, "joint_prefix")
        if best is not None:
            self.best_length = best.length
        return decay

    def until_done(
        self,
        tracker: Tracker,
        decoder: Decoder | None,
        on_progress: Callable[[Progress], None],
        stop_requested: Callable[[], bool],
    ) -> TrainingResult:
        meter = ThroughputMeter(self.draft.lm_head.weight.device)
        stream = steps(
            self.source,
            self.loader,
            step_shape(
                self.config,
                self.windows,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
            ),
            device_copies(self._device),
            self.optimizer_step.planned,
        )
        decoding = DraftDecoding(
            decoder,
            every=self.config.decode_every,
            run_path=self.run_path,
            processes=self.processes,
            tracker=tracker,
        )
        with meter.paused():
            if self._is_chosen_by_decoding:
                decoding.catch_up()
            if decoding.is_due(self.step, is_last=self._is_done()):  # unless it was before a kill
                decoding.start(self.step, self.draft)
        # Before the first step there is nothing to save: a stop request waits for it.
        while not self._is_done() and not (
            self.metrics and self.processes.any(stop_requested() or decoding.has_failed)
        ):
            with meter.waiting():
                loaded = next(stream)
            rate = learning_rate(self.config, self.step, self.decay)
            outcomes = self.optimizer_step.take(
                loaded, rate=rate, name=f"step {self.step + 1}", cure=self._remedy
            )
            self.step, self.loader = self.step + 1, loaded.after
            meter.add(loaded)
            self._update_metrics(outcomes)
            on_progress(Progress(step=self.step, loss=self._last_metrics.loss))
            if self.step % self.config.log_every == 0 or self._is_done():
                tracker.log({**self._last_metrics.scalars(), "learning_rate": rate}, step=self.step)
                tracker.log(meter.scalars(), step=self.step)
            is_best = False
            if self.step % self.config.held_out_every == 0 or self._is_done():
                is_best = self._measure(tracker)
            is_decoded = decoding.is_due(self.step, is_last=self._is_done())
            is_best = is_decoded if self._is_chosen_by_decoding else is_best
            if is_best or self.step % self.config.checkpoint_every == 0 or self._is_done():
                with meter.paused():
                    decoding.wait()
                self._save(decoding.undecided)
            if is_decoded:
                with meter.paused():
                    decoding.start(self.step, self.draft)
            decoding.collect()
        stream.close()  # type: ignore[attr-defined]  # a generator
        if self.processes.any(self._is_unsaved()):
            self._save(decoding.undecided)
        with meter.paused():
            decoding.wait()
        decoding.report_failure(is_stopping=stop_requested() and not self._is_done())
        assert self.saved is not None  # noqa: S101
        return TrainingResult(
            num_steps=self.step,
            figures=self._last_metrics,
            tokens_per_second=meter.tokens_per_second * self.processes.world_size,
            dtype=dtype_name(self.dtype),
            checkpoint_path=self.saved,
            stopped=not self._is_done(),
            best=self._best(),
            decoded=next(reversed(read_points(self.run_path)), None),
        )

    def _is_unsaved(self) -> bool:
        """Return whether the first process has no checkpoint of this step: only it surely sees."""
        if not self.processes.is_first:
            return False
        return self.saved is None or checkpoint.read(self.saved).step != self.step

    def _best(self) -> Best | None:
        by = self.config.best_by
        found = checkpoint.find_best(self.run_path, by)
        return None if found is None else Best(step=found.step, by=by, length=found.length)

    @property
    def _is_chosen_by_decoding(self) -> bool:
        return self.config.best_by == "decoding"

    @property
    def _last_metrics(self) -> Metrics:
        assert self.metrics is not None  # noqa: S101 (at least one step is done)
        return self.metrics

    def _is_done(self) -> bool:
        if self.config.max_steps is not None:
            return self.step >= self.config.max_steps
        return self.loader.epoch >= self.config.epochs

    @property
    def _remedy(self) -> str:
        newest = f"The newest checkpoint is {self.saved}. " if self.saved else ""
        return (
            f"{newest}Verify the store (eyas run verify RECIPE). If it is sound, train another run "
            "(--run) with a lower training.learning_rate; it can start from this run's draft (eyas "
            "run export, then training.start)"
        )

    @property
    def _device(self) -> torch.device:
        return self.optimizer_step.device

    def _update_metrics(self, outcomes: Sequence[TttOutcome]) -> None:
        losses = torch.stack([o.loss.detach().float() for o in outcomes]).sum() if outcomes else 0.0
        loss = self.processes.total(torch.as_tensor(losses, device=self._device)).item()
        accuracies = self._summed(o.step_correct for o in outcomes) / self._summed(
            o.step_supervised for o in outcomes
        ).clamp(min=1)
        self.metrics = dataclasses.replace(
            self.metrics or Metrics(loss=loss, first_loss=loss),
            loss=loss,
            step_losses=tuple(self._summed(o.step_losses for o in outcomes).tolist()),
            step_accuracies=tuple(accuracies.tolist()),
        )

    def _summed(self, values: Iterable[Tensor]) -> Tensor:
        """Return [L] the sum over this process's batches and over all processes."""
        zeros = torch.zeros(self.config.ttt_length, device=self._device)
        return self.processes.total(sum(values, zeros))

    def _measure(self, tracker: Tracker) -> bool:
        """Measure on the held-out split; return whether the draft is the best so far."""
        if self.held_out is None:
            return False
        batches = held_out_batches(
            self.held_out,
            self.windows,
            batch_tokens=self.config.batch_tokens,
            max_tokens=self.config.held_out_tokens,
        )
        found = measure(self.optimizer_step.forward, batches, self.optimizer_step.target_head)
        self.metrics = dataclasses.replace(
            self._last_metrics,
            held_out_step=self.step,
            held_out_length=found.length,
            held_out_accuracies=found.accuracies,
            held_out_acceptances=found.acceptances,
            held_out_joint_prefix_accuracies=found.joint_prefix_accuracies,
        )
        tracker.log(self._last_metrics.held_out_scalars(), step=self.step)
        is_best = self.processes.any(found.length > self.best_length)  # all processes save, or none
        self.best_length = max(self.best_length, found.length)
        return is_best

    def _save(self, undecided: int | None) -> None:
        weights = {name: whole(tensor) for name, tensor in self.draft.state_dict().items()}
        where = f"step {self.step}: no checkpoint was written"
        require_finite(weights, where=where, cure=self._remedy)
        optimizer = state_tensors(self.optimizers, self.draft)
        if self.processes.is_first:
            record = Checkpoint(
                step=self.step,
                loader=self.loader,
                identity=self.identity,
                figures=dataclasses.asdict(self._last_metrics),
                decay=self.decay,
            )
            checkpoint.save(
                self.run_path,
                record,
                weights,
                optimizer,
                keep_last=self.config.keep_last,
                best_by=self.config.best_by,
                undecided=undecided,
                omitted=self.draft.target_tensors().keys(),
            )
        self.processes.wait()
        # Another machine may see the new folder later: only the first process looks.
        is_first, own = self.processes.is_first, checkpoint.folder_of(self.run_path, self.step)
        self.saved = checkpoint.newest(self.run_path) if is_first else own


def _identity(
    config: TrainingConfig, draft: DraftModel, source: SampleSource, dtype: torch.dtype
) -> Mapping[str, Any]:
    vocabulary = draft.t2d.cpu().numpy().tobytes()
    return {
        "source_id": source.source_id,
        # The dtype that "auto" selected here: a run does not change it on another machine.
        "training": {**config.identity(), "dtype": dtype_name(dtype)},
        "draft": draft.config.identity(),
        "draft_vocabulary": hashlib.sha256(vocabulary).hexdigest(),
    }
