"""`verify`: compares a store with its commit records and with the target's own output."""

import time

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.bridge.store_identity import decided
from flows.config.store import StoreConfig
from flows.errors import DamagedStoreError
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports.store_summaries import SIZES, VerifySummary
from flows.reports.store_tables import verify_rows
from flows.tasks.find_damage import find_damage, probe_recompute
from flows.tasks.prepare import prepare_weights
from flows.workspace import DEFAULT_HOME, Workspace
from storage.store import Store


@flow(
    name="verify",
    flow_run_name=run_name("verify-{target.name}-{dataset.name}"),
    persist_result=False,
)
def verify_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    home: str = DEFAULT_HOME,
    deep: bool = True,
) -> VerifySummary:
    """Compare sizes or, with `deep`, every byte and the semantic probe of every shard.

    Raises:
        DamagedStoreError: something is damaged; the artifact of the run lists it.
        MismatchError: the store holds states of another target.

    """
    started = time.monotonic()
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    root = store_root(store, space)
    opened = Store.open(root)
    recompute = None
    if deep:
        prepare_weights(target)
        recompute = probe_recompute(decided(target, opened.identity.target_fields), opened)
    title = f"{target.name}-{dataset.name}"
    findings = find_damage(opened, deep=deep, recompute=recompute, title=title)
    summary = VerifySummary(
        store_root=root,
        what="every byte, and the semantic probe" if deep else SIZES,
        num_shards=len(opened.shard_ids()),
        findings=tuple(findings),
        seconds=time.monotonic() - started,
    )
    rows = verify_rows(summary)
    title = f"Store of {target.name} on {dataset.name}"
    report_stage(title, rows, key=artifact_key("verify", target.name, dataset.name))
    if findings:
        raise DamagedStoreError(
            f"{len(findings)} problems in {root}, first {findings[0].object_key}: "
            f"{findings[0].problem}; run the repair flow of the same recipe: eyas repair "
            f"{target.name}"
        )
    return summary
