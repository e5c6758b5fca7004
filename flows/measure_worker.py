"""The child process that measures what states cost: runs the target on a few samples, stores them.

Reads one `MeasureJob` (JSON) on standard input and answers with one `Measurement` (JSON). Bytes are
those of real shards of a temporary store, one for each profile.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target import NORM_CONVENTION, TargetModel
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from flows.child_process import answer, say
from flows.stored_source import to_stored
from storage.identity import PROFILES, StoreIdentity
from storage.plan import PlannedSample, PlannedShard
from storage.record import CommitRecord
from storage.samples import last_needed
from storage.store import Store

LAST_STATES = "last_hidden_state"


class MeasureJob(BaseModel):
    """Which samples to run the target on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    token_file: Path
    rows: tuple[int, ...]


class ProfileCost(BaseModel):
    """What one profile makes of the states."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_token: float
    """Everything but last hidden states."""
    bytes_per_last_state: float
    """A last hidden state; not every token keeps one."""
    write_seconds: float
    """To encode and write the samples measured."""


class Measurement(BaseModel):
    """What the samples measured cost on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: int
    capture_seconds: float
    device: str
    profiles: dict[str, ProfileCost]


def main() -> int:
    """Measure what standard input asks for; return the exit status."""
    job = MeasureJob.model_validate_json(sys.stdin.read())
    return answer(lambda: say(_measure(job)))


def _measure(job: MeasureJob) -> Measurement:
    file = TokenFile(job.token_file)
    samples = [file.fetch(row) for row in job.rows]
    target = TargetModel.load(job.target)
    list(target.capture(samples[:1]))  # what is slow only once is not measured
    started = time.monotonic()
    states = list(target.capture(samples))
    seconds = time.monotonic() - started
    return Measurement(
        num_tokens=sum(len(sample) for sample in samples),
        capture_seconds=seconds,
        device=str(target.device),
        profiles={profile: _cost(target, profile, states) for profile in PROFILES},
    )


def _cost(target: TargetModel, profile: str, states: Sequence[HiddenStateSample]) -> ProfileCost:
    shard = PlannedShard.of(
        [PlannedSample(sample_id=state.sample_id, num_tokens=len(state)) for state in states]
    )
    with tempfile.TemporaryDirectory(prefix="eyas-measure-") as folder:
        store = Store.create(folder, _identity(target, profile))
        started = time.monotonic()
        record = store.write_shard(shard, map(to_stored, states))
        seconds = time.monotonic() - started
    last_bytes = _last_bytes(record)
    return ProfileCost(
        bytes_per_token=(record.stored_bytes - last_bytes) / record.num_tokens,
        bytes_per_last_state=last_bytes / max(num_last_states(states), 1),
        write_seconds=seconds,
    )


def num_last_states(samples: Sequence[TokenizedSample | HiddenStateSample]) -> int:
    """Return for how many tokens of `samples` a store keeps the last hidden state."""
    return sum(int(last_needed(sample.loss_mask).sum()) for sample in samples)


def _last_bytes(record: CommitRecord) -> int:
    objects = record.objects.items()
    return sum(digest.num_bytes for key, digest in objects if key.startswith(LAST_STATES))


def _identity(target: TargetModel, profile: str) -> StoreIdentity:
    return StoreIdentity(
        target_fingerprint="",
        target_fields={},
        tokenizer_fingerprint="",
        template_fingerprint="",
        aux_layers=target.aux_layers,
        hidden_size=target.model_config.hidden_size,
        vocab_size=target.model_config.vocab_size,
        norm_convention=NORM_CONVENTION,
        profile=profile,
    )


if __name__ == "__main__":
    sys.exit(main())
