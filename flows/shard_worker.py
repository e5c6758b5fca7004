"""The child process that loads the target once and makes a batch of shards.

Reads one `ShardJob` (JSON) on standard input and answers with one `ShardReport` (JSON) a line on
standard output. One shard is written while the target computes the next, so that neither waits for
the other; a kill costs these two and nothing else: only what is committed shows.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from eagle_core.errors import MismatchError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target import TargetModel
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from flows.child_process import answer, say
from flows.recompute import TargetRecompute, partial_target
from flows.semantic_probe import probed, require_as_said
from flows.stored_source import to_stored
from storage.plan import PlannedShard
from storage.probe import ProbePoint
from storage.recompute import Recompute
from storage.store import Store


class ShardJob(BaseModel):
    """What a child process is asked to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    store_root: str
    plan_id: str
    shard_ids: tuple[str, ...]
    token_files: tuple[Path, ...]


class ShardReport(BaseModel):
    """One line of the answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tokens", "shard"]
    tokens: int = 0
    shard_id: str = ""


def main() -> int:
    """Make the shards of the job on standard input; return the exit status."""
    job = ShardJob.model_validate_json(sys.stdin.read())
    return answer(lambda: _run(job))


def _run(job: ShardJob) -> None:
    store = Store.open(job.store_root)
    shards = {shard.shard_id: shard for shard in store.load_plan(job.plan_id).shards}
    files = [TokenFile(path) for path in job.token_files]
    target = TargetModel.load(job.target)
    recompute = TargetRecompute(target.lm_head_weight, partial_target(job.target, store.identity))
    left_out = store.identity.left_out is not None
    with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
        storing: Future[str] | None = None
        for shard_id in job.shard_ids:
            samples = _samples_of(shards[shard_id], files)
            probe: list[ProbePoint] = []
            counted = _counted(target.capture(samples, recomputable=left_out))
            states = list(
                probed(counted, samples, shard_id=shard_id, into=probe, left_out=left_out)
            )
            _report(storing)
            storing = writer.submit(_store, store, shards[shard_id], states, probe, recompute)
        _report(storing)


def _store(
    store: Store,
    shard: PlannedShard,
    states: Sequence[HiddenStateSample],
    probe: Sequence[ProbePoint],
    recompute: Recompute,
) -> str:
    """Write a shard and read it back, in a thread: the target goes on with the next one."""
    store.write_shard(shard, map(to_stored, states), probe=probe)
    require_as_said(store, shard.shard_id, recompute)
    return shard.shard_id


def _report(storing: Future[str] | None) -> None:
    if storing is not None:
        say(ShardReport(kind="shard", shard_id=storing.result()))


def _samples_of(shard: PlannedShard, files: Sequence[TokenFile]) -> list[TokenizedSample]:
    samples = [
        sample
        for file in files
        for sample in file.by_id([name for name in shard.sample_ids if name in file])
    ]
    if len(samples) != len(shard.sample_ids):
        raise MismatchError(
            f"shard {shard.shard_id} needs {len(shard.sample_ids)} samples, the token files have "
            f"{len(samples)} of them; run the hidden-states flow again to plan anew"
        )
    return samples


def _counted(samples: Iterable[HiddenStateSample]) -> Iterator[HiddenStateSample]:
    for sample in samples:
        say(ShardReport(kind="tokens", tokens=len(sample)))
        yield sample


if __name__ == "__main__":
    sys.exit(main())
