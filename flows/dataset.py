"""`dataset`: download or read conversations, clean, deduplicate and split them."""

from prefect import flow

from eagle_core.data.config import DatasetConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports import rows as report
from flows.summaries import DatasetSummary
from flows.tasks.prepare import prepare_dataset
from flows.workspace import DEFAULT_HOME, Workspace


@flow(name="dataset", flow_run_name=run_name("dataset-{dataset.name}"), persist_result=False)
def dataset_flow(dataset: DatasetConfig, home: str = DEFAULT_HOME) -> DatasetSummary:
    """Build the data set unless it exists already, from the same source with the same options."""
    space = Workspace.at(home, target="", dataset=dataset.name)
    summary = prepare_dataset(dataset, space)
    report_stage(
        f"Data set {dataset.name}",
        report.dataset_rows(summary),
        key=artifact_key("dataset", dataset.name),
        following=[("next", "eyas plan RECIPE, or eyas run hidden-states RECIPE")],
    )
    return summary
