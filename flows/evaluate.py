"""`evaluate`: acceptance on held-out prompts by real decoding, before and after training."""

import time

from prefect import flow

from eagle_core.acceptance import AcceptanceReport
from eagle_core.dataset_config import DatasetConfig
from eagle_core.draft import DraftModel
from eagle_core.evaluation import EvaluationConfig, evaluate
from eagle_core.prompts import Prompt, sample_prompts
from eagle_core.target import TargetModel
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from eagle_core.training_config import TrainingConfig
from flows import report
from flows.artifact_key import artifact_key
from flows.draft_setup import load_trained, set_up_draft
from flows.prepare import prepare
from flows.progress import stage_progress
from flows.run_page import acceptance_plot, write_run_page
from flows.run_record import EVALUATION_NAME, write_stage
from flows.summaries import EvaluateSummary
from flows.workspace import DEFAULT_HOME


@flow(
    name="evaluate",
    flow_run_name="evaluate-{target.name}-{dataset.name}-{run}",
    persist_result=False,
)
def evaluate_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    training: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
    home: str = DEFAULT_HOME,
    run: str = "main",
) -> EvaluateSummary:
    """Decode held-out prompts with the untrained and the trained draft of run `run`.

    Raises:
        ConfigError: the run has no checkpoint yet, or no held-out prompt is short enough.

    """
    started = time.monotonic()
    space, tokens = prepare(target, dataset, home)
    prompts = sample_prompts(
        TokenFile(tokens.held_out_path),
        num_prompts=evaluation.num_prompts,
        max_tokens=evaluation.max_prompt_tokens,
    )
    run_path = space.run_path(run)
    setup = set_up_draft(target, training, TokenFile(tokens.train_path), run_path)
    trained = load_trained(setup)
    model = TargetModel.load(target)
    summary = EvaluateSummary(
        untrained=_measure(model, setup.draft, prompts, evaluation, title="untrained draft"),
        trained=_measure(model, trained, prompts, evaluation, title="trained draft"),
        seconds=time.monotonic() - started,
    )
    write_stage(run_path / EVALUATION_NAME, summary)
    write_run_page(run_path)
    report.publish_table(
        f"Acceptance: {target.name} on {dataset.name}, run {run}",
        report.evaluate_rows(summary),
        key=artifact_key("acceptance", target.name, dataset.name, run),
    )
    report.publish_plot(
        f"Acceptance by depth: {target.name} on {dataset.name}, run {run}",
        acceptance_plot(summary, None),
        key=artifact_key("acceptance-by-depth", target.name, dataset.name, run),
    )
    return summary


def _measure(
    model: TargetModel,
    draft: DraftModel,
    prompts: list[Prompt],
    evaluation: EvaluationConfig,
    *,
    title: str,
) -> AcceptanceReport:
    total = min(len(prompts), evaluation.num_prompts)
    with stage_progress(title, key=artifact_key(title), total=total, unit="prompts") as bar:
        return evaluate(
            model,
            draft,
            prompts,
            evaluation,
            stop_ids=model.stop_ids,
            on_progress=lambda progress: bar.move_to(progress.num_done),
        )
