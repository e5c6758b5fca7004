"""The child process that sketches a target whose weights are not here, from its config.json.

Sends one `SketchLine` per `SketchJob`.
"""

import sys

from pydantic import BaseModel, ConfigDict

from eagle_core.target.config import TargetConfig
from eagle_core.target.memory.free_memory import ALONE, MemoryShare
from eagle_core.target.sketch import sketch
from flows.workers.channel import send, serve


class SketchJob(BaseModel):
    """Which target to sketch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    task_tokens: int
    """Tokens of one task: no pass of a streamed target takes more."""
    memory: MemoryShare = ALONE
    """What a process that computes shards may take."""


class SketchLine(BaseModel):
    """What it would cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    placement: str
    reason: str
    pass_tokens: int
    pass_bytes: int
    seconds_per_token: float | None
    """None if there is no placement on this machine."""
    device: str
    is_quantized: bool


def _sketch(job: SketchJob) -> SketchLine:
    found = sketch(job.target, job.task_tokens, job.memory)
    chosen = found.chosen
    return SketchLine(
        placement=chosen.placement if chosen else "none on this machine",
        reason=chosen.reason if chosen else found.why_none,
        pass_tokens=found.pass_tokens,
        pass_bytes=chosen.pass_bytes if chosen else 0,
        seconds_per_token=found.seconds_per_token,
        device=found.device,
        is_quantized=found.is_quantized,
    )


if __name__ == "__main__":
    sys.exit(serve(SketchJob, lambda job: send(_sketch(job))))
