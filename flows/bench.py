"""`bench`: how to serve a draft on this machine, and what acceptance makes it pay."""

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.evaluation.bench import BenchConfig, swept
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.serving.engines import find_any_engine
from eagle_core.serving.served import EngineName
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.evaluate import evaluate_flow
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports import rows as report
from flows.summaries import EvaluateSummary
from flows.workspace import DEFAULT_HOME, RunName, Workspace


@flow(
    name="bench",
    flow_run_name=run_name("bench-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def bench_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    training: TrainingConfig = TrainingConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    bench: BenchConfig = BenchConfig(),
    home: str = DEFAULT_HOME,
    run: RunName = "main",
) -> EvaluateSummary:
    """Evaluate run `run` on an engine with every setting of `bench`, and recommend one.

    This is `evaluate` with a sweep: `evaluation` gives the prompts and how they are decoded, and
    the results replace those of the last evaluation on that engine. `serve` reads them. Other
    load on the machine makes the speeds wrong.

    Raises:
        ConfigError: as `evaluate`; or no engine is installed.
        MismatchError: the run was trained for another target, tokenizer or template.
        TransientError: the engine's server died.

    """
    engine = _engine(bench, evaluation, target)
    summary = evaluate_flow(
        target=target,
        dataset=dataset,
        training=training,
        evaluation=swept(bench, evaluation, engine),
        home=home,
        run=run,
    )
    run_path = Workspace.at(home, target=target.name, dataset=dataset.name).run_path(run)
    report_stage(
        f"Bench: {target.name} on {dataset.name}, run {run}",
        report.evaluate_rows(summary),
        key=artifact_key("bench", target.name, dataset.name, run, engine),
        following=[
            *report.where_to_look(run_path, engine),
            ("next", f"eyas serve {run_path} --engine {engine}"),
        ],
    )
    return summary


def _engine(bench: BenchConfig, evaluation: EvaluationConfig, target: TargetConfig) -> EngineName:
    if bench.engine != "auto":
        return bench.engine
    if evaluation.engine != "eyas":
        return evaluation.engine
    return find_any_engine(target)
