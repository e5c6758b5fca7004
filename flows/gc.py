"""`gc`: lists what no kept snapshot of a store needs; deletes it only on request."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.config.store import StoreConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports.store_tables import garbage_rows
from flows.workspace import DEFAULT_HOME, Workspace
from storage.maintenance import OLDER_THAN_HOURS
from storage.maintenance.gc import Garbage, collect, find_garbage, snapshots_to_keep
from storage.store import Store


@flow(name="gc", flow_run_name=run_name("gc-{target.name}-{dataset.name}"), persist_result=False)
def gc_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    home: str = DEFAULT_HOME,
    keep: tuple[str, ...] = (),
    drop_unfinished: bool = False,
    release: tuple[str, ...] = (),
    *,
    older_than_hours: Annotated[float, Field(ge=0)] = OLDER_THAN_HOURS,
    delete: bool = False,
) -> Garbage:
    """List unneeded objects and, with `delete`, remove them. No hidden-states flow may be running.

    Args:
        target: with `dataset`, names the store below `home`.
        dataset: see `target`.
        store: where the store is, if not below `home`.
        home: folder of the stores.
        keep: snapshots to keep beside the latest and the young ones; by default all that are not an
            earlier version of another one.
        drop_unfinished: also drop the shards of unfinished plans.
        release: runs whose snapshots are released, because their folders are gone.
        older_than_hours: younger objects stay, because another process may be about to reference
            them.
        delete: remove the objects, instead of only listing them.

    """
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    opened = Store.open(store_root(store, space))
    kept = snapshots_to_keep(
        opened, named=keep, released=release, older_than_hours=older_than_hours
    )
    garbage = find_garbage(
        opened,
        keep=kept,
        keep_unfinished=not drop_unfinished,
        older_than_hours=older_than_hours,
    )
    for run in release if delete else ():
        opened.refs.release_all(run)
    if delete:
        collect(opened, garbage)
    rows = garbage_rows(garbage, kept, deleted=delete)
    title = f"Garbage in the store of {target.name} on {dataset.name}"
    report_stage(title, rows, key=artifact_key("gc", target.name, dataset.name))
    return garbage
