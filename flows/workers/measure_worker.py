"""The child process that measures the cost of states: runs the target on samples, stores them.

Sends one `Measurement` per `MeasureJob`. Bytes are those of real shards in temporary stores, one
per profile.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from eagle_core.errors import ConfigError, CorruptError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import CapturingTarget, capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.fingerprint import NORM_CONVENTION
from eagle_core.target.layerwise.recompute_model import RecomputeModel, StoredStates
from eagle_core.target.layerwise.streamed import StreamedTarget
from eagle_core.target.memory.free_memory import ALONE, MemoryShare
from eagle_core.target.placement import load_placed, placement_of
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.store_identity import omitted_states
from flows.bridge.stored_source import to_stored
from flows.workers.channel import send, serve
from storage.encoding.shard import group_objects
from storage.profiles import PROFILES, ProfileName
from storage.records import keys
from storage.records.commit_record import CommitRecord
from storage.records.identity import OmittedStates, StoreIdentity
from storage.records.plan import PlannedShard
from storage.samples import last_needed
from storage.store import Store

LAST_STATES = "last_hidden_state"


class MeasureJob(BaseModel):
    """Which samples to run the target on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    token_file: Path
    rows: tuple[int, ...]
    task_tokens: int
    """Tokens of one task: no pass of a streamed target takes more."""
    recompute: bool
    """Whether a process that computes shards also holds the layers that recompute states."""
    memory: MemoryShare = ALONE
    """What a process that computes shards may take."""


class ProfileCost(BaseModel):
    """The cost of the states under one profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_token: float
    """Everything but last hidden states."""
    bytes_per_last_state: float
    """A last hidden state; not every token keeps one."""
    write_seconds: float
    """To encode and write the measured samples."""


class RecomputeMeasurement(BaseModel):
    """The cost of computing and recomputing omitted states."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    capture_seconds: float
    """Of the whole target, one sequence at a time."""
    recompute_seconds: float
    """Of its first and last layers."""
    load_seconds: float
    weight_bytes: int
    profiles: dict[str, ProfileCost]


class MeasuredPlacement(BaseModel):
    """Where the weights were, and what a pass of a streamed target takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    reason: str
    pass_tokens: int = 0
    """Tokens that pass through all layers before the first is loaded again; 0 if not streamed."""
    pass_bytes: int = 0
    """Of the layers, read once in each pass."""


class Measurement(BaseModel):
    """The cost of the measured samples on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: int
    capture_seconds: float
    device: str
    placement: MeasuredPlacement
    profiles: dict[str, ProfileCost]
    """Of all states."""
    recompute: RecomputeMeasurement | None
    """With omitted states; None if layers of this target cannot be run alone."""


def _measure(job: MeasureJob) -> Measurement:
    file = TokenFile(job.token_file)
    samples = [file.fetch(row) for row in job.rows]
    # First, as in a process that computes shards: the placement goes by what is free then.
    model = RecomputeModel.load(job.target) if job.recompute else None
    target, placement = _placed(job)
    # Warm up: one-time costs are not measured.
    list(capture_states(target, samples[:1], on_unusable=_ignore_unusable))
    states, seconds = _timed(target, samples, placement)
    if not states:
        raise CorruptError(
            f"target {job.target.name}: none of {len(samples)} tried samples has finite states; "
            "check the weights and try dtype float32"
        )
    usable = {state.sample_id for state in states}
    samples = [sample for sample in samples if sample.sample_id in usable]
    return Measurement(
        num_tokens=sum(len(sample) for sample in samples),
        capture_seconds=seconds,
        device=str(target.device),
        placement=placement,
        profiles={profile: _cost(_identity(target, profile, None), states) for profile in PROFILES},
        recompute=_measure_recompute(job.target, target, samples, placement, model),
    )


def _placed(job: MeasureJob) -> tuple[CapturingTarget, MeasuredPlacement]:
    """Return the target, and where its weights are."""
    chosen = placement_of(job.target, job.memory)
    target = load_placed(job.target, chosen)
    placement = MeasuredPlacement(
        name=chosen.placement,
        reason=chosen.reason,
        pass_tokens=min(chosen.group_tokens, job.task_tokens),
        pass_bytes=chosen.pass_bytes,
    )
    return target, placement


def _timed(
    target: CapturingTarget,
    samples: Sequence[TokenizedSample],
    placement: MeasuredPlacement,
    *,
    for_recompute: bool = False,
) -> tuple[list[HiddenStateSample], float]:
    """Return the states of `samples`, and the seconds that they take.

    Of a streamed target, it is their share of a pass that is as long as passes will be.
    """
    if isinstance(target, StreamedTarget):
        target.forget_times()
    started = time.monotonic()
    states = list(
        capture_states(target, samples, for_recompute=for_recompute, on_unusable=_ignore_unusable)
    )
    seconds = time.monotonic() - started
    if isinstance(target, StreamedTarget):
        rest = seconds - target.times.total
        num_tokens = sum(map(len, samples))
        share = num_tokens / max(placement.pass_tokens, 1)
        seconds = rest + target.times.seconds(placement.pass_tokens) * share
    return states, seconds


def _ignore_unusable(sample: TokenizedSample, reason: str) -> None:
    """Skip a sample that the store would exclude too."""


def _measure_recompute(
    config: TargetConfig,
    target: CapturingTarget,
    samples: Sequence[TokenizedSample],
    placement: MeasuredPlacement,
    model: RecomputeModel | None,
) -> RecomputeMeasurement | None:
    try:
        omitted = omitted_states(config, target.model_config)
    except ConfigError:
        return None
    model = model or RecomputeModel.load(config)
    states, seconds = _timed(target, samples, placement, for_recompute=True)
    stored = [StoredStates(input_ids=s.input_ids, late=s.aux_hidden_states[:, -1]) for s in states]
    model.recompute(stored[0])  # warm up: one-time costs are not measured
    begun = time.monotonic()
    for sequence in stored:
        model.recompute(sequence)
    return RecomputeMeasurement(
        capture_seconds=seconds,
        recompute_seconds=time.monotonic() - begun,
        load_seconds=model.load_seconds,
        weight_bytes=model.num_bytes,
        profiles={
            profile: _cost(_identity(target, profile, omitted), states) for profile in PROFILES
        },
    )


def _cost(identity: StoreIdentity, states: Sequence[HiddenStateSample]) -> ProfileCost:
    shard = PlannedShard.holding(states)
    with tempfile.TemporaryDirectory(prefix="eyas-measure-") as folder:
        store = Store.create(folder, identity)
        started = time.monotonic()
        record = store.write_shard(shard, map(to_stored, states))
        seconds = time.monotonic() - started
        last_bytes = _last_bytes(store, record)
    return ProfileCost(
        bytes_per_token=(record.stored_bytes - last_bytes) / record.num_tokens,
        bytes_per_last_state=last_bytes / max(num_last_states(states), 1),
        write_seconds=seconds,
    )


def num_last_states(samples: Sequence[TokenizedSample | HiddenStateSample]) -> int:
    """Return the number of tokens of `samples` whose last hidden state a store keeps."""
    return sum(int(last_needed(sample.loss_mask).sum()) for sample in samples)


def _last_bytes(store: Store, record: CommitRecord) -> int:
    files = {
        key: store.root.read(keys.shard_object(record.shard_id, key)) for key in record.objects
    }
    objects = group_objects(files, shard_id=record.shard_id).items()
    return sum(len(data) for key, data in objects if key.startswith(LAST_STATES))


def _identity(
    target: CapturingTarget, profile: ProfileName, omitted: OmittedStates | None
) -> StoreIdentity:
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
        omitted=omitted,
    )


if __name__ == "__main__":
    sys.exit(serve(MeasureJob, lambda job: send(_measure(job))))
