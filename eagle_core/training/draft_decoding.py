"""Real decoding of held-out prompts while a draft trains, at most one at a time.

Invariant: a checkpoint is written only when what is due before its step is decoded and recorded.
So a run that resumes from it lacks at most the point of that step, whose draft the checkpoint has.
Only after a stop request the checkpoint comes first, and a kill meanwhile may cost a point. Nothing
here changes what training computes.
"""

from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from eagle_core.draft.model import DraftModel
from eagle_core.tracking.tracker import Tracker
from eagle_core.training.checkpoint import FROZEN
from eagle_core.training.decoded_points import (
    Decoded,
    DecodedPoint,
    add_point,
    read_points,
    weights_digest,
)
from eagle_core.training.distributed import Processes, whole

_LOOK_SECONDS = 1.0
"""How long one process waits before it tells the others: no collective operation waits longer."""


class Decoder(Protocol):
    """Decodes the same prompts with one draft after the other."""

    @property
    def prompts(self) -> str:
        """Digest of the prompts, and of how they are decoded."""

    @property
    def is_awaited(self) -> bool:
        """Whether training waits for each decoding: both use the same device."""

    def decode(self, weights: Mapping[str, Tensor], /) -> "Future[Decoded]":
        """Begin to decode with a draft's weights, which may change when this returns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    step: int
    draft: str
    result: "Future[Decoded]"


class DraftDecoding:
    """Decodes every few steps; all processes of a run call each method at the same step."""

    def __init__(
        self,
        decoder: Decoder | None,
        *,
        every: int,
        run_path: Path,
        processes: Processes,
        tracker: Tracker,
    ) -> None:
        """Use the first process's decoder; without one, nothing is decoded."""
        self._decoder, self._every, self._processes = decoder, every, processes
        self._run_path, self._tracker = run_path, tracker
        self._pending: _Pending | None = None
        self.is_on = every > 0 and processes.any(decoder is not None)
        self._is_awaited = processes.any(decoder is not None and decoder.is_awaited)

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Return whether the draft of a step is decoded: at the interval, and the last one."""
        return self.is_on and step > 0 and (is_last or step % self._every == 0)

    def start(self, step: int, draft: DraftModel) -> None:
        """Decode with the draft of a step, unless its point is recorded; earlier ones end first."""
        self.wait()
        tensors = {name: whole(t) for name, t in draft.state_dict().items() if name != FROZEN}
        if self._decoder is not None:
            weights = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            self._start(self._decoder, step, weights)
        if self._is_awaited:
            self.wait()

    def _start(self, decoder: Decoder, step: int, weights: Mapping[str, Tensor]) -> None:
        digest = weights_digest(weights)
        own = (step, digest, decoder.prompts)
        if own in {(one.step, one.draft, one.prompts) for one in read_points(self._run_path)}:
            return
        self._pending = _Pending(step=step, draft=digest, result=decoder.decode(weights))

    def collect(self) -> None:
        """Record what is decoded, if it is; waits for nothing."""
        pending = self._pending
        if self._decoder is None or pending is None or not pending.result.done():
            return
        point = DecodedPoint(
            step=pending.step,
            draft=pending.draft,
            prompts=self._decoder.prompts,
            decoded=pending.result.result(),
        )
        self._pending = None
        self._tracker.log(point.scalars(), step=point.step)
        add_point(self._run_path, point)

    def wait(self) -> None:
        """Wait for what is being decoded, and record it."""
        while self.is_on and self._processes.any(self._is_busy()):
            pass
        self.collect()

    def _is_busy(self) -> bool:
        if self._pending is None:
            return False
        wait([self._pending.result], timeout=_LOOK_SECONDS)
        return not self._pending.result.done()
