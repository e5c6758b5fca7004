"""`evaluate`: acceptance on held-out prompts by real decoding, before and after training."""

import dataclasses
import json
import math
import time

from prefect import flow

from eagle_core.acceptance import AcceptanceReport
from eagle_core.dataset_config import DatasetConfig
from eagle_core.draft import DraftModel
from eagle_core.evaluation import EvaluationConfig, evaluate
from eagle_core.files import write_text
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
from flows.summaries import EvaluateSummary
from flows.workspace import DEFAULT_HOME

RESULT_NAME = "evaluation.json"


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
    write_text(run_path / RESULT_NAME, to_json(summary))
    report.publish_table(
        f"Acceptance: {target.name} on {dataset.name}, run {run}",
        report.evaluate_rows(summary),
        key=artifact_key("acceptance", target.name, dataset.name, run),
    )
    return summary


def to_json(summary: EvaluateSummary) -> str:
    """Return the summary as strict JSON: a depth that was never reached is null, not NaN."""
    return json.dumps(_without_nan(dataclasses.asdict(summary)), indent=2, allow_nan=False)


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


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
