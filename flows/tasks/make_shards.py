"""Computes the missing shards of a store: in batches, on the runner of the recipe."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NoReturn

from prefect.artifacts import create_table_artifact
from prefect.futures import PrefectFuture

import eagle_core.errors
import storage.errors
from eagle_core.target.config import TargetConfig
from flows.bridge.exclusions import ExclusionLimit
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.errors import ChildFailedError, ChildKilledError, MissingShardsError
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.best_effort import best_effort
from flows.orchestration.progress import stage_progress
from flows.orchestration.task_runners import running
from flows.reports.store_summaries import ShardResult
from flows.reports.store_tables import shard_table
from flows.summaries import TokensSummary
from flows.tasks.generate import generate_shards
from flows.workers.pool import memory_share
from flows.workers.shard_batch import ShardBatch, ShardPlan, ShardReport
from storage.records.exclusions import Exclusion
from storage.store import Store

EVERY_BATCH_MEETS = (
    ChildFailedError,
    ChildKilledError,
    eagle_core.errors.ConfigError,
    eagle_core.errors.TransientError,
    storage.errors.ConfigError,
    storage.errors.OutOfSpaceError,
    storage.errors.TransientError,
)
"""Faults of the machine, its settings or the store; bad samples affect only one batch."""
CERTAIN = (ChildFailedError, eagle_core.errors.ConfigError, storage.errors.ConfigError)
"""Of these, one before any batch has succeeded ends the run: each costs a loading of the target."""
FAILURES_AT_FIRST = 3
"""This many of the others, before any batch has succeeded, end it too."""
EQUAL_FAILURES = 3
"""This many of one kind and message end the run, even if some batches have succeeded."""
_DIGITS = re.compile(r"\d+")
"""Numbers of shards and bytes: two failures that differ only in them are equal."""


def make_shards(
    store: Store,
    plan: ShardPlan,
    target: TargetConfig,
    config: StoreConfig,
    runner: RunnerConfig,
    tokens: TokensSummary,
    *,
    may_exclude: bool = True,
) -> int:
    """Run one task per batch of shards, wait for all of them, then name the missing shards.

    Returns the number of computed shards.

    Raises:
        MissingShardsError: some batches failed; everything else is committed and stays.
        CorruptError: more samples have non-finite states than the store may exclude, or one has and
            none may be excluded.
        EagleCoreError, StorageError, FlowError: the first batches all failed, or several batches
            failed in the same way, or there is no space left.
        FlowError: the runner's package is not installed.

    """
    exclusions = ExclusionLimit(target, config, tokens, store)
    sizes = {shard.shard_id: shard.num_tokens for shard in plan.shards}
    total = sum(sizes.values())
    key = artifact_key("hidden-states-progress", target.name)
    made: list[ShardResult] = []
    with stage_progress("hidden states", key=key, total=total, unit="tokens") as progress:

        def on_report(report: ShardReport) -> None:
            progress.advance(report.tokens, note=report.planned_id[:8])

        with running(runner, target, generate_shards, on_report=on_report) as submit:
            batches = list(_batches(store, plan, target, config, runner, tokens))
            futures = [submit(batch) for batch in batches]
            failures, has_made_some = _Failures(), False
            for batch, future in zip(batches, futures, strict=True):
                future.wait()
                if future.state.is_completed():
                    has_made_some = True
                    shards = future.result()
                    made += shards
                    found = [one for shard in shards for one in shard.excluded]
                    if found and not may_exclude:
                        raise _was_finite(target, found[0])
                    exclusions.add(found)
                    if runner.kind != "processes":  # a cluster reports no samples
                        progress.advance(sum(sizes[shard_id] for shard_id in batch.shard_ids))
                elif failures.end_the_run(_error_of(future), has_made_some=has_made_some):
                    future.result()
    exclusions.exclude()
    committed = set(store.shard_ids())
    written = {one.planned_id: one.shard_id for one in made}
    names = [written.get(shard.shard_id, shard.shard_id) for shard in plan.shards]
    _publish_table([name for name in names if name in committed], made, store, target)
    missing = [name for name in names if name and name not in committed]
    if missing:
        _raise_missing(futures, missing, num_wanted=len(names))
    return sum(map(bool, names))


def _was_finite(target: TargetConfig, found: Exclusion) -> eagle_core.errors.CorruptError:
    return eagle_core.errors.CorruptError(
        f"target {target.name}, {found}, but they were when this shard was computed: other "
        "hardware, driver or versions? Repair on the machine that computed it, or run "
        "hidden-states, which excludes the sample and publishes a new snapshot; runs of the "
        "earlier snapshot then have to start over"
    )


class _Failures:
    """The failed batches so far: do they show that all others would fail too?"""

    def __init__(self) -> None:
        self._num_at_first = 0
        self._equal: Counter[tuple[type[BaseException], str]] = Counter()

    def end_the_run(self, error: BaseException | None, *, has_made_some: bool) -> bool:
        """Count one more; return whether it ends the run."""
        if error is None:
            return False
        if isinstance(error, storage.errors.OutOfSpaceError):
            return True
        if isinstance(error, CERTAIN) and not has_made_some:
            return True
        self._num_at_first += isinstance(error, EVERY_BATCH_MEETS) and not has_made_some
        kind = type(error), _DIGITS.sub("0", str(error).partition("\n")[0])
        self._equal[kind] += isinstance(error, ChildFailedError | eagle_core.errors.ConfigError)
        return self._num_at_first == FAILURES_AT_FIRST or self._equal[kind] == EQUAL_FAILURES


def _error_of(future: PrefectFuture[tuple[ShardResult, ...]]) -> BaseException | None:
    found: object = future.result(raise_on_failure=False)
    return found if isinstance(found, BaseException) else None


def _batches(
    store: Store,
    plan: ShardPlan,
    target: TargetConfig,
    config: StoreConfig,
    runner: RunnerConfig,
    tokens: TokensSummary,
) -> Iterator[ShardBatch]:
    share = memory_share(target, runner)
    for first in range(0, len(plan.shards), config.shards_per_task):
        members = plan.shards[first : first + config.shards_per_task]
        yield ShardBatch(
            target=target,
            store_root=store.root.url,
            plan_id=plan.plan_id,
            shard_ids=tuple(shard.shard_id for shard in members),
            token_files=(tokens.train_path, tokens.held_out_path),
            first=first,
            last=first + len(members) - 1,
            inactivity_timeout_seconds=runner.inactivity_timeout_seconds,
            memory=share,
            credentials=config.credentials,
        )


def _publish_table(
    done: Sequence[str], made: Sequence[ShardResult], store: Store, target: TargetConfig
) -> None:
    """Show the shards of this run as a table in the Prefect UI."""
    if not done:
        return
    with best_effort("the table of shards"):
        create_table_artifact(
            shard_table(done, {shard.shard_id: shard for shard in made}, store),
            key=artifact_key("hidden-states-shards", target.name),
            description=f"Shards of {target.name} computed by this run: {len(done):,}",
        )


def _raise_missing(
    futures: Sequence[PrefectFuture[tuple[ShardResult, ...]]],
    missing: Sequence[str],
    *,
    num_wanted: int,
) -> NoReturn:
    for future in futures:
        if future.state.is_failed():
            future.result()  # raises one cause, usually the same for all
    raise MissingShardsError(
        f"{len(missing)} of {num_wanted} shards are missing: {', '.join(missing[:5])}; "
        "the others are committed. Press Retry in the Prefect UI, or run the flow again, to "
        "compute only these"
    )
