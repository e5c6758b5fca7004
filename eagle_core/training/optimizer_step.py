"""One step of the optimizer: the gradient of its batches, checked before a weight changes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial

import torch
from torch import Tensor

from eagle_core.draft.model import DraftModel
from eagle_core.errors import CorruptError
from eagle_core.samples import SampleSource
from eagle_core.training.config import TrainingConfig
from eagle_core.training.distributed import Processes, whole, without_sync
from eagle_core.training.flex_attention import require_agreement
from eagle_core.training.loader import LoadedStep
from eagle_core.training.optimizers import make_optimizers, set_learning_rate
from eagle_core.training.packing import PackedBatch
from eagle_core.training.pieces import PieceReader, Windows
from eagle_core.training.ttt import TttModule, TttOutcome, fuses_attention, loss_totals, with_plan


class OptimizerStep:
    """A draft, its optimizers and the target's head, on one of the processes of a run."""

    def __init__(
        self,
        config: TrainingConfig,
        draft: DraftModel,
        target_head: Tensor,
        source: SampleSource,
        windows: Windows,
        processes: Processes,
    ) -> None:
        """Wrap a draft, whose weights are those of the first step.

        Args:
            config: settings of the run.
            draft: on the device to train on; sharded, if several processes share it.
            target_head: [D, Ht] the target's head, for the draft vocabulary; its dtype is that of
                the matrix products.
            source: training samples, named in errors.
            windows: how samples are divided.
            processes: those that share the batches of a step.

        Raises:
            ConfigError: `compile` needs FlexAttention, but its results are wrong on this GPU.

        """
        self.draft, self.target_head = draft, target_head
        self._config, self._source, self._windows = config, source, windows
        self._processes = processes
        if fuses_attention(config, self.device):
            require_agreement(
                num_heads=draft.config.num_attention_heads,
                num_kv_heads=draft.config.num_key_value_heads,
                head_dim=draft.config.head_dim,
                dtype=target_head.dtype,
                device=self.device,
                window=draft.config.sliding_window,
            )
        self._module = processes.parallel(TttModule(draft, config), config.sharding)
        self._trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(draft, config)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.target_head.device

    @cached_property
    def planned(self) -> Callable[[PackedBatch], PackedBatch]:
        """Returns a batch with its `StepPlan`."""
        return partial(with_plan, t2d=self.draft.t2d.cpu(), options=self._config)

    def take(self, loaded: LoadedStep, *, rate: float, name: str, cure: str) -> list[TttOutcome]:
        """Change the weights by one step; return the outcomes of this process's batches.

        Args:
            loaded: batches of this process.
            rate: learning rate.
            name: of the step, in errors.
            cure: what to do about an error, in its message.

        Raises:
            CorruptError: the loss or the gradient is not finite; no weight was changed.

        """
        own = [batch.to(self.device) for batch in loaded.batches]
        counts = [loss_totals(self.draft.t2d, batch, self._config) for batch in own]
        zeros = torch.zeros(self._config.ttt_length, device=self.device)
        totals = self._processes.total(sum(counts, zeros))
        outcomes = [
            self._backward(batch, totals, is_last=number == loaded.most_batches - 1)
            for number, batch in enumerate(own)
        ]
        for number in range(len(own), loaded.most_batches):
            # All processes must synchronise equally often: one with fewer batches adds a batch
            # times zero.
            self._backward(self._filler, None, is_last=number == loaded.most_batches - 1)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._config.max_grad_norm)
        problem = self._not_finite(own, [outcome.loss for outcome in outcomes], whole(norm))
        if problem:
            raise CorruptError(f"{name}: {problem}; no weight was changed. {cure}")
        set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return outcomes

    def forward(
        self, batch: PackedBatch, target_head: Tensor, totals: Tensor | None = None
    ) -> TttOutcome:
        """Return the outcome of a batch, as `TttModule` does, in the dtype of the run."""
        dtype = self.target_head.dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            outcome: TttOutcome = self._module(batch, target_head, totals)
        return outcome

    def _backward(self, batch: PackedBatch, totals: Tensor | None, *, is_last: bool) -> TttOutcome:
        with nullcontext() if is_last else without_sync(self._module):
            outcome = self.forward(batch, self.target_head, totals)
            factor = 0 if totals is None else self._processes.world_size  # gradients are averaged
            (outcome.loss * factor).backward()  # type: ignore[no-untyped-call]  # torch
        return outcome

    @cached_property
    def _filler(self) -> PackedBatch:
        piece = self._windows.pieces(self._source.lengths[:1])[:1]
        return self.planned(PieceReader(self._source).read(piece)).to(self.device)

    def _not_finite(
        self, batches: Sequence[PackedBatch], losses: Sequence[Tensor], norm: Tensor
    ) -> str:
        """Return what is not finite, and of which samples; nothing if all is, on all processes.

        All are looked at together, so that a GPU is waited for once.
        """
        finite = torch.stack([torch.isfinite(value.detach()) for value in (norm, *losses)])
        if not self._processes.any(not finite.all()):
            return ""
        what, of_batches = f"the gradient has norm {norm.item()}", batches
        for batch, loss in zip(batches, losses, strict=True):
            if not torch.isfinite(loss):
                what, of_batches = f"the loss is {loss.item()}", [batch]
                break
        names = dict.fromkeys(name for batch in of_batches for name in batch.sample_ids)
        origins = ", ".join(f"{name} ({self._source.origin(name)})" for name in names)
        return f"{what} on samples {origins}, or is not finite on another process"
