"""Checks before the first shard: what is missing, what it costs, and whether it fits."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import aux_layers, read_model_config
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.sampled_rows import rows_of_tokens, spread_rows
from flows.bridge.store_identity import omitted_states
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.reports.cost import (
    CostEstimate,
    PlacementCost,
    RecomputeCost,
    encoding_name,
    require_fits,
)
from flows.reports.units import human_bytes
from flows.summaries import TokensSummary
from flows.workers.child_process import run_child
from flows.workers.measure_worker import (
    MeasuredPlacement,
    MeasureJob,
    Measurement,
    ProfileCost,
    RecomputeMeasurement,
    num_last_states,
)
from flows.workers.pool import local_slots, memory_share
from flows.workers.sketch_worker import SketchJob, SketchLine
from storage.objects.object_store import ObjectStore
from storage.records import keys
from storage.records.plan import PlannedSample, plan_shards
from storage.store import Store

MEASURED_TOKENS = 4096
SAMPLES_COUNTED = 2000
"""Loss masks that are read to find the share of tokens whose last hidden state is stored."""
TYPICAL_SHARES = {"raw": 1.0, "lossless": 0.654, "int8": 0.482, "int6": 0.356, "int4": 0.224}
"""Stored bytes of states by raw ones, as measured on SmolLM2 (docs/benchmarks/store.md)."""
TEACHER_BYTES = 8
WORST_CASE = 1.05
"""Factor on the raw bytes of all states: no profile comes near it."""


def wanted_samples(tokens: TokensSummary) -> Iterator[PlannedSample]:
    """Yield the samples of both splits, those to train on first."""
    for path in (tokens.train_path, tokens.held_out_path):
        file = TokenFile(path)
        for sample_id, length in zip(file.sample_ids, file.lengths.tolist(), strict=True):
            yield PlannedSample(sample_id=sample_id, num_tokens=length)


@task(task_run_name="preflight", cache_policy=NO_CACHE, persist_result=False)
def preflight(
    target: TargetConfig,
    config: StoreConfig,
    tokens: TokensSummary,
    root: str,
    runner: RunnerConfig = RunnerConfig(),
) -> None:
    """Raise DoesNotFitError unless there is room for every missing shard.

    Nothing is measured if even the worst case fits.
    """
    place = ObjectStore.at(root)
    free = place.free_bytes()
    raw = _raw_bytes_per_token(target, recompute=config.recompute)
    worst = int(tokens.num_tokens * raw * WORST_CASE)
    if (free is None or worst <= free) and _within_budget(config.budget, root, worst):
        room = "" if free is None else f", {human_bytes(free)} are free"
        get_run_logger().info("states take at most %s%s", human_bytes(worst), room)
        return
    require_fits(estimate_cost(target, config, tokens, root, runner))


def _within_budget(budget: int | None, root: str, more: int) -> bool:
    if budget is None:
        return True
    is_there = ObjectStore.at(root).exists(keys.IDENTITY)
    stored = Store.open(root).commits().totals.stored_bytes if is_there else 0
    return stored + more <= budget


def _raw_bytes_per_token(target: TargetConfig, *, recompute: bool) -> int:
    model = read_model_config(target, weights.locate_description(target))
    if recompute:
        omitted_states(target, model)  # a clear error if recompute is impossible
    states = len(aux_layers(target, model.num_hidden_layers)) + (-1 if recompute else 1)
    return states * 2 * int(model.hidden_size) + 16


def estimate_cost(
    target: TargetConfig,
    config: StoreConfig,
    tokens: TokensSummary,
    root: str,
    runner: RunnerConfig = RunnerConfig(),
    *,
    weights_are_here: bool = True,
) -> CostEstimate:
    """Return the cost of the missing states of the store at `root`, measured with the target.

    Without its weights it is sketched. The target is placed as in one of the runner's processes.
    """
    place = ObjectStore.at(root)
    store = Store.open(root) if place.exists(keys.IDENTITY) else None
    wanted = wanted_samples(tokens)
    plan = plan_shards(
        store.commits().lacks(wanted) if store else wanted, shard_tokens=config.shard_tokens
    )
    to_make = sum(shard.num_tokens for shard in plan.shards)
    chosen = encoding_name(config.profile, recompute=config.recompute)
    task_tokens = min(to_make, config.shard_tokens * config.shards_per_task)
    cost = _NO_COST
    if to_make and weights_are_here:
        cost = _measured_cost(target, config, tokens, runner, task_tokens, chosen)
    elif to_make:
        cost = _sketched_cost(target, config, tokens, runner, task_tokens)
    return CostEstimate(
        store_root=root,
        profile=chosen,
        num_samples=tokens.num_samples,
        num_tokens=tokens.num_tokens,
        num_supervised_tokens=tokens.num_supervised_tokens,
        num_shards=len(plan.shards),
        missing_samples=sum(len(shard.sample_ids) for shard in plan.shards),
        missing_tokens=to_make,
        stored_bytes=store.commits().totals.stored_bytes if store else 0,
        bytes_per_token=cost.bytes_per_token,
        tokens_per_second=cost.tokens_per_second,
        device=cost.device,
        free_bytes=place.free_bytes(),
        budget_bytes=config.budget,
        recompute=cost.recompute,
        placement=_placement_cost(cost.placement, to_make, task_tokens) if cost.placement else None,
        is_sketch=cost.is_sketch,
        counts_too_much=cost.counts_too_much,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _TokenCost:
    """What a token costs, measured with the target or sketched without."""

    bytes_per_token: Mapping[str, float]
    """By encoding."""
    tokens_per_second: float
    device: str
    placement: MeasuredPlacement | None
    recompute: RecomputeCost | None = None
    is_sketch: bool = False
    counts_too_much: bool = False


_NO_COST = _TokenCost(bytes_per_token={}, tokens_per_second=0.0, device="", placement=None)


def _measured_cost(
    target: TargetConfig,
    config: StoreConfig,
    tokens: TokensSummary,
    runner: RunnerConfig,
    task_tokens: int,
    chosen: str,
) -> _TokenCost:
    get_run_logger().info("measuring the target on about %s tokens", f"{MEASURED_TOKENS:,}")
    file = TokenFile(tokens.train_path)
    job = MeasureJob(
        target=target,
        token_file=tokens.train_path,
        rows=rows_of_tokens(file, MEASURED_TOKENS),
        task_tokens=task_tokens,
        recompute=config.recompute,
        memory=memory_share(target, runner),
    )
    line = _in_child(
        job,
        runner,
        module="flows.workers.measure_worker",
        what="the process that measures the target",
    )
    found = Measurement.model_validate_json(line)
    share, encodings = _last_share(file), _encodings(found)
    capture, recompute = found.capture_seconds, None
    if found.recompute is not None:
        recompute = _recompute_cost(found.recompute, found.num_tokens)
        capture = found.recompute.capture_seconds if config.recompute else capture
    seconds = capture + encodings[chosen].write_seconds
    return _TokenCost(
        bytes_per_token={
            name: cost.bytes_per_token + share * cost.bytes_per_last_state
            for name, cost in encodings.items()
        },
        tokens_per_second=found.num_tokens / max(seconds, 1e-9),
        device=found.device,
        placement=found.placement,
        recompute=recompute,
    )


def _sketched_cost(
    target: TargetConfig,
    config: StoreConfig,
    tokens: TokensSummary,
    runner: RunnerConfig,
    task_tokens: int,
) -> _TokenCost:
    if config.recompute:
        omitted_states(target, read_model_config(target, weights.locate_description(target)))
    get_run_logger().info(
        "the weights of %s are not here: one layer of each kind is timed with random ones",
        target.name,
    )
    job = SketchJob(target=target, task_tokens=task_tokens, memory=memory_share(target, runner))
    line = _in_child(
        job,
        runner,
        module="flows.workers.sketch_worker",
        what="the process that sketches the target",
    )
    found = SketchLine.model_validate_json(line)
    model = read_model_config(target, weights.locate_description(target))
    state, num_aux = 2 * int(model.hidden_size), len(aux_layers(target, model.num_hidden_layers))
    every = num_aux + _last_share(TokenFile(tokens.train_path))
    kept_states = {False: every}
    if config.recompute or _may_omit(target):
        kept_states[True] = num_aux - 1
    seconds = found.seconds_per_token
    return _TokenCost(
        bytes_per_token={
            encoding_name(profile, recompute=recompute): kept * state * share + TEACHER_BYTES
            for recompute, kept in kept_states.items()
            for profile, share in TYPICAL_SHARES.items()
        },
        tokens_per_second=0.0 if seconds is None else 1 / max(seconds, 1e-12),
        device=found.device,
        placement=MeasuredPlacement(
            name=found.placement,
            reason=found.reason,
            pass_tokens=found.pass_tokens,
            pass_bytes=found.pass_bytes,
        ),
        is_sketch=True,
        counts_too_much=found.is_quantized,
    )


def _may_omit(target: TargetConfig) -> bool:
    try:
        omitted_states(target, read_model_config(target, weights.locate_description(target)))
    except ConfigError:
        return False
    return True


def _placement_cost(found: MeasuredPlacement, to_make: int, task_tokens: int) -> PlacementCost:
    num_passes = 0
    if found.pass_tokens:
        passes_per_task = math.ceil(task_tokens / found.pass_tokens)
        num_passes = math.ceil(passes_per_task * to_make / task_tokens)
    return PlacementCost(
        name=found.name,
        reason=found.reason,
        pass_tokens=found.pass_tokens,
        num_passes=num_passes,
        read_bytes=num_passes * found.pass_bytes,
    )


def _encodings(found: Measurement) -> Mapping[str, ProfileCost]:
    """Return the cost by profile of all states, then of states with some omitted."""
    every = {encoding_name(p, recompute=False): cost for p, cost in found.profiles.items()}
    if found.recompute is None:
        return every
    half = {encoding_name(p, recompute=True): cost for p, cost in found.recompute.profiles.items()}
    return {**every, **half}


def _recompute_cost(measured: RecomputeMeasurement, num_tokens: int) -> RecomputeCost:
    return RecomputeCost(
        weight_bytes=measured.weight_bytes,
        load_seconds=measured.load_seconds,
        tokens_per_second=num_tokens / max(measured.recompute_seconds, 1e-9),
        share_of_capture=measured.recompute_seconds / max(measured.capture_seconds, 1e-9),
    )


def _in_child(job: MeasureJob | SketchJob, runner: RunnerConfig, *, module: str, what: str) -> str:
    """Return the last line of a child process that sees what a worker sees."""
    is_child = runner.kind == "processes"
    lines = list(
        run_child(
            module,
            job,
            what=what,
            environment=local_slots(job.target, runner.num_workers)[0] if is_child else {},
        )
    )
    return lines[-1]


def _last_share(file: TokenFile) -> float:
    """Return the share of tokens whose last hidden state is stored."""
    samples: list[TokenizedSample] = [file.fetch(row) for row in spread_rows(file, SAMPLES_COUNTED)]
    return num_last_states(samples) / sum(len(sample) for sample in samples)
