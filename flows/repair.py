"""`repair`: recompute exactly the damaged shards, bit-exactly on the same machine."""

import time
from collections.abc import Sequence

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.store_identity import decided, store_identity
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.errors import DamagedStoreError
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports.store_summaries import RepairSummary
from flows.reports.store_tables import repair_rows
from flows.summaries import TokensSummary
from flows.tasks.find_damage import find_damage, probe_recompute
from flows.tasks.make_shards import make_shards
from flows.tasks.prepare import check_runnable, prepare, prepare_weights
from flows.tasks.publish import publish
from flows.workers.shard_batch import ShardPlan
from flows.workspace import DEFAULT_HOME
from storage.errors import CorruptError
from storage.maintenance.repair import damaged_shards
from storage.maintenance.verify import verify_shard, verify_store
from storage.recompute import Recompute
from storage.records import keys
from storage.records.plan import Plan, PlannedShard
from storage.records.presence import Finding
from storage.store import Store


@flow(
    name="repair",
    flow_run_name=run_name("repair-{target.name}-{dataset.name}"),
    persist_result=False,
)
def repair_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    runner: RunnerConfig = RunnerConfig(),
    home: str = DEFAULT_HOME,
    deep: bool = True,
) -> RepairSummary:
    """Find damage as `verify` does, revoke the damaged shards and recompute them.

    Raises:
        DamagedStoreError: some damage is outside this recipe's data set; the rest was repaired.
        MismatchError: the store holds states of another target, template or profile.

    """
    started = time.monotonic()
    prepare_weights(target)
    here = runner.kind == "processes"
    check_runnable(target, runs_here=here, captured="here" if here else "on workers")
    space, tokens = prepare(target, dataset, home)
    root = store_root(store, space)
    existing = Store.open(root)  # a clear error without a store, instead of a new empty one
    target = decided(target, existing.identity.target_fields)
    opened = Store.create(root, store_identity(target, store, tokens))
    recompute = probe_recompute(target, opened)
    title = f"{target.name}-{dataset.name}"
    findings = find_damage(opened, deep=deep, recompute=recompute if deep else None, title=title)
    for finding in findings:
        if keys.folder(finding.object_key) in {keys.PLANS, keys.EXCLUSIONS}:
            opened.root.delete(finding.object_key)  # what is then missing is planned again
    damaged = {keys.folder(finding.object_key) for finding in findings}
    if keys.MANIFESTS in damaged:
        opened.mend_manifests()
    remade, foreign = _split(damaged_shards(opened, findings), tokens)
    if remade:
        _recompute_shards(opened, remade, target, store, runner, tokens)
    if keys.SNAPSHOTS in damaged:
        publish(opened, tokens, space, shards_made=len(remade), started=started)
    summary = RepairSummary(
        store_root=root,
        num_shards=len(opened.shard_ids()),
        findings=tuple(findings),
        remade=tuple(shard.shard_id for shard in remade),
        left=tuple(_left(opened, remade, foreign, recompute)),
        seconds=time.monotonic() - started,
    )
    rows = repair_rows(summary)
    title = f"Repair: {target.name} on {dataset.name}"
    report_stage(title, rows, key=artifact_key("repair", target.name, dataset.name))
    if summary.left:
        first = summary.left[0]
        raise DamagedStoreError(
            f"{len(summary.left)} objects in {root} are still damaged, first {first.object_key}: "
            f"{first.problem}. They do not belong to the current data set {dataset.name}: repair "
            f"with the recipe that made them, or drop them with `eyas gc {root}`"
        )
    return summary


def _split(
    shards: Sequence[PlannedShard], tokens: TokensSummary
) -> tuple[list[PlannedShard], list[PlannedShard]]:
    """Return the shards whose samples this data set has, and the others."""
    files = [TokenFile(path) for path in (tokens.train_path, tokens.held_out_path)]
    ours: list[PlannedShard] = []
    foreign: list[PlannedShard] = []
    for shard in shards:
        known = all(any(name in file for file in files) for name in shard.sample_ids)
        (ours if known else foreign).append(shard)
    return ours, foreign


def _recompute_shards(
    opened: Store,
    shards: Sequence[PlannedShard],
    target: TargetConfig,
    store: StoreConfig,
    runner: RunnerConfig,
    tokens: TokensSummary,
) -> None:
    """Recompute the shards; after a kill, this flow or `hidden-states` finishes the plan."""
    plan = Plan.of(shards)
    is_new = not opened.root.exists(keys.plan(plan.plan_id))
    opened.plans.save(plan)  # before any record is removed: it lists the samples of the shards
    damaged = {key for shard in shards for key in _data_keys(opened, shard)}
    for shard in shards:
        opened.revoke(shard.shard_id)
    work = ShardPlan(plan_id=plan.plan_id, shards=plan.shards)
    make_shards(opened, work, target, store, runner, tokens, may_exclude=False)
    committed = {key for shard in shards for key in _data_keys(opened, shard)}
    for key in damaged - committed:  # the recomputed objects are beside them
        opened.root.delete(key)
    if is_new:
        opened.plans.delete(plan.plan_id)


def _data_keys(opened: Store, shard: PlannedShard) -> Sequence[str]:
    """Return the object keys of a shard's data, as far as its record is readable."""
    try:
        objects = opened.log.objects(shard.shard_id)
    except CorruptError:
        return ()
    return [keys.shard_object(shard.shard_id, key) for key in objects]


def _left(
    opened: Store,
    remade: Sequence[PlannedShard],
    foreign: Sequence[PlannedShard],
    recompute: Recompute,
) -> Sequence[Finding]:
    """Return the remaining damage: by size everywhere, by every byte in the shards concerned."""
    findings = list(verify_store(opened, deep=False, recompute=None))
    committed = set(opened.shard_ids())
    for shard in (*remade, *foreign):
        if shard.shard_id in committed:
            findings.extend(verify_shard(opened, shard.shard_id, recompute=recompute))
    return list(dict.fromkeys(findings))
