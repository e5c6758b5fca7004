"""Real decoding of held-out prompts while a draft trains, at most one at a time.

Invariant: a checkpoint is written only when what is due before its step is decoded and recorded.
So a run that resumes from it lacks at most the point of that step, whose draft the checkpoint has.
Only after a stop request or a failed decoding the checkpoint comes first. Where decoding decides
which checkpoint is the best, the draft without a point then keeps its own checkpoint, from which it
is decoded on resume; elsewhere the curve may lack that point. Nothing here changes what training
computes.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file
from torch import Tensor

from eagle_core.draft.model import DraftModel
from eagle_core.tracking.tracker import Tracker
from eagle_core.training import checkpoint
from eagle_core.training.decoded_points import (
    Decoded,
    DecodedPoint,
    add_points,
    read_points,
    weights_digest,
)
from eagle_core.training.distributed import Processes, whole

logger = logging.getLogger(__name__)

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
        self._failure: BaseException | None = None
        self.is_on = every > 0 and processes.any(decoder is not None)
        self._is_awaited = processes.any(decoder is not None and decoder.is_awaited)

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Return whether the draft of a step is decoded: at the interval, and the last one."""
        return self.is_on and step > 0 and (is_last or step % self._every == 0)

    @property
    def has_failed(self) -> bool:
        """Whether a decoding failed: nothing more is decoded."""
        return self._failure is not None

    @property
    def undecided(self) -> int | None:
        """Return the step whose draft has no point yet: it is being decoded, or that failed."""
        return None if self._pending is None else self._pending.step

    def catch_up(self) -> None:
        """Decode with each checkpoint of the run that has no point of these prompts.

        Checkpoints are compared by such points only. All are recorded at once: until then, the best
        by earlier prompts stays the best.

        Raises:
            EagleCoreError: decoding failed.

        """
        folders = iter(checkpoint.sound_folders(self._run_path)[::-1] if self._decoder else ())
        points: list[DecodedPoint] = []
        while self._processes.any(self._begin_next(folders)):
            self._finish()
            if self._pending is not None:
                points.append(self._point(self._pending))
                self._pending = None
        if points:
            for point in points:
                self._tracker.log(point.scalars(), step=point.step)
            add_points(self._run_path, *points)

    def _begin_next(self, folders: Iterator[Path]) -> bool:
        """Begin to decode with the next checkpoint that lacks a point; False without one."""
        for folder in folders:
            self._begin(checkpoint.read(folder).step, load_file(folder / checkpoint.WEIGHTS_NAME))
            if self._pending is not None:
                return True
        return False

    def start(self, step: int, draft: DraftModel) -> None:
        """Decode with the draft of a step, unless its point is recorded; earlier ones end first."""
        self.wait()
        omitted = draft.target_tensors()
        tensors = {name: whole(t) for name, t in draft.state_dict().items() if name not in omitted}
        if not self.has_failed:
            self._begin(step, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
        if self._is_awaited:
            self.wait()

    def _begin(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Begin to decode in the first process, unless the point is recorded."""
        if self._decoder is None:
            return
        digest = weights_digest(weights)
        own = (step, digest, self._decoder.prompts)
        if own in {(one.step, one.draft, one.prompts) for one in read_points(self._run_path)}:
            return
        try:
            result = self._decoder.decode(weights)
        except Exception as error:  # noqa: BLE001 (the future has it, as every other failure)
            result = Future()
            result.set_exception(error)
        self._pending = _Pending(step=step, draft=digest, result=result)

    def collect(self) -> None:
        """Record what is decoded, if it is; waits for nothing, and keeps a failure for later."""
        pending = self._pending
        if self.has_failed or pending is None or not pending.result.done():
            return
        self._failure = pending.result.exception()
        if self._failure is None:
            point = self._point(pending)
            self._pending = None
            self._tracker.log(point.scalars(), step=point.step)
            add_points(self._run_path, point)

    def _point(self, pending: _Pending) -> DecodedPoint:
        assert self._decoder is not None  # noqa: S101 (else nothing is pending)
        return DecodedPoint(
            step=pending.step,
            draft=pending.draft,
            prompts=self._decoder.prompts,
            decoded=pending.result.result(),
        )

    def wait(self) -> None:
        """Wait for what is being decoded, and record it."""
        self._finish()
        self.collect()

    def report_failure(self, *, is_stopping: bool) -> None:
        """Raise the error of a decoding that failed; when stopping, what ended it may be a signal.

        A stop request is often sent to all processes of a run.
        """
        if self._failure is None:
            return
        if not is_stopping:
            raise self._failure
        logger.warning("step %s was not decoded: %s", self.undecided, self._failure)

    def _finish(self) -> None:
        while self.is_on and self._processes.any(self._is_busy()):
            pass

    def _is_busy(self) -> bool:
        if self._pending is None:
            return False
        wait([self._pending.result], timeout=_LOOK_SECONDS)
        return not self._pending.result.done()
