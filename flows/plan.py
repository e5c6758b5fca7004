"""`plan`: the cost estimate: shards, bytes per profile, time, and whether it fits."""

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.config.store import StoreConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports.cost import CostEstimate, require_fits
from flows.reports.store_tables import cost_rows
from flows.tasks.preflight import estimate_cost
from flows.tasks.prepare import prepare
from flows.workspace import DEFAULT_HOME


@flow(
    name="plan", flow_run_name=run_name("plan-{target.name}-{dataset.name}"), persist_result=False
)
def plan(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    home: str = DEFAULT_HOME,
) -> CostEstimate:
    """Estimate what `hidden-states` would compute and what it would cost; compute nothing.

    Raises:
        ConfigError: the target cannot be run, such as for its architecture.
        DoesNotFitError: the disk or `store.budget` is too small; states by how much, and remedies.

    """
    space, tokens = prepare(target, dataset, home, capture="here")
    estimate = estimate_cost(target, store, tokens, store_root(store, space))
    rows = cost_rows(estimate)
    title = f"Plan: {target.name} on {dataset.name}"
    report_stage(title, rows, key=artifact_key("plan", target.name, dataset.name))
    require_fits(estimate)
    return estimate
