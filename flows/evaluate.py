"""`evaluate`: acceptance on held-out prompts by real decoding, before and after training."""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import PromptResult, summarise, summarise_by_category
from eagle_core.evaluation.benchmarks.report import SweepReport, sweep_report
from eagle_core.evaluation.benchmarks.sweep import Sweep
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts, require_trees
from eagle_core.evaluation.engine_report import EngineReport
from eagle_core.evaluation.estimate import AcceptanceEstimate
from eagle_core.evaluation.measure_engine import measure_engine, num_texts
from eagle_core.evaluation.prompt_file import read_prompts
from eagle_core.evaluation.prompts import Prompt, first_prompts, sample_prompts
from eagle_core.serving.engines import find_engine
from eagle_core.target.config import TargetConfig
from eagle_core.target.embedded_tokens import require_embedded
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import for_decoding, read_model_config
from eagle_core.target.placement import load_decoding_target
from eagle_core.target.positions import Positions
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.target.weights import locate
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_setup import set_up_draft
from flows.bridge.first_weights import load_first_weights
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_plot
from flows.orchestration.best_effort import best_effort
from flows.orchestration.progress import stage_progress
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports import rows as report
from flows.reports.engine_tables import has_lengths, speed_plot
from flows.reports.run_page import acceptance_plot, write_run_page
from flows.reports.run_record import RunRecord, evaluation_name, write_stage
from flows.summaries import EvaluateSummary
from flows.tasks.benchmark_prompts import ask_engine, ask_here, choose_sweep
from flows.tasks.prepare import check_runnable
from flows.tasks.served_draft import served_for
from flows.tasks.trained_run import TrainedRun, open_run
from flows.workspace import DEFAULT_HOME, RunName

logger = logging.getLogger(__name__)


@flow(
    name="evaluate",
    flow_run_name=run_name("evaluate-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def evaluate_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    training: TrainingConfig = TrainingConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    home: str = DEFAULT_HOME,
    run: RunName = "main",
) -> EvaluateSummary:
    """Decode prompts with the draft that run `run` started from, and with its best checkpoint.

    The settings of the run are read from its folder: `dataset` only names the run, and `training`
    is needed only for a run of an older version, without `run.json`. An engine decodes with the
    best checkpoint only, and without a draft.

    Raises:
        ConfigError: the run has no checkpoint yet, no prompt is short enough, a prompt file
            holds no questions, the target cannot be decoded speculatively, or the engine is not
            installed or refuses target or draft.
        MismatchError: the run was trained for another target, tokenizer or template.
        TransientError: the engine's server died.

    """
    started = time.monotonic()
    trained = open_run(target, dataset, training, home, run, evaluation.checkpoint)
    run_path = trained.path
    by_engine = evaluation.engine != "eyas"
    check_runnable(target, runs_here=not by_engine, rolls_back=not by_engine, captured=None)
    sweep = choose_sweep(trained, evaluation)
    prompts = _prompts(trained, evaluation) if sweep is None else []
    measured = (_by_engine if by_engine else _here)(trained, prompts, evaluation, sweep)
    if measured.warning:
        logger.warning("%s", measured.warning)
    by_group = summarise_by_category(measured.after, draft_tokens=evaluation.drafted_depth)
    summary = EvaluateSummary(
        evaluation=evaluation,
        checkpoint_step=measured.step,
        untrained=summarise(measured.before, draft_tokens=evaluation.drafted_depth)
        if measured.before
        else None,
        trained=summarise(measured.after, draft_tokens=evaluation.drafted_depth),
        trained_by_group=by_group if len(by_group) > 1 and sweep is None else {},
        estimate=_estimate(run_path, measured.step),
        engine=measured.engine,
        warning=measured.warning,
        seconds=time.monotonic() - started,
        benchmarks=measured.benchmarks,
    )
    publish_plot(
        f"Acceptance by depth: {target.name} on {dataset.name}, run {run}",
        acceptance_plot(summary),
        key=artifact_key(
            "acceptance-by-depth", target.name, dataset.name, run, *_named(evaluation)
        ),
    )
    if measured.engine is not None and has_lengths(measured.engine):
        publish_plot(
            f"Speed by draft length: {target.name} on {dataset.name}, run {run}",
            speed_plot(measured.engine),
            key=artifact_key("speed", target.name, dataset.name, run, *_named(evaluation)),
        )
    write_stage(run_path / evaluation_name(evaluation.engine), summary)
    with best_effort("report.html"):
        write_run_page(run_path)
    report_stage(
        f"Acceptance: {target.name} on {dataset.name}, run {run}",
        report.evaluate_rows(summary),
        key=artifact_key("acceptance", target.name, dataset.name, run, *_named(evaluation)),
        following=[
            *report.where_to_look(run_path, evaluation.engine),
            ("next", "eyas run export RECIPE"),
        ],
    )
    return summary


def _named(evaluation: EvaluationConfig) -> list[str]:
    """Return the engine for names of artifacts; none for Eyas itself."""
    return [] if evaluation.engine == "eyas" else [evaluation.engine]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """What was decoded."""

    step: int
    """Of the checkpoint."""
    before: list[PromptResult]
    """With the draft before training; empty if it was not measured."""
    after: list[PromptResult]
    engine: EngineReport | None = None
    warning: str = ""
    benchmarks: SweepReport | None = None


def _here(
    trained: TrainedRun,
    prompts: Sequence[Prompt],
    evaluation: EvaluationConfig,
    sweep: Sweep | None,
) -> _Measured:
    """Decode in this process, with the draft at the start and with the trained one."""
    setup = set_up_draft(trained.target, trained.training, trained.path)
    load_first_weights(setup)
    model = load_decoding_target(trained.target)
    if sweep is not None:
        prompts = ask_here(sweep, model, trained, evaluation)
    require_trees(model, prompts, evaluation)  # of all sets, before the first is decoded
    decode = _Decoder(model, prompts, evaluation, trained.stop_ids)
    before = decode(setup.draft, title="draft at the start")
    step = trained.load_weights(setup).step
    after = decode(setup.draft, title="trained draft")
    return _Measured(
        step=step,
        before=before,
        after=after,
        warning=inequality_warning(trained.target, before, after),
        benchmarks=_by_set(sweep, prompts, before, after, evaluation),
    )


def _by_engine(
    trained: TrainedRun,
    prompts: Sequence[Prompt],
    evaluation: EvaluationConfig,
    sweep: Sweep | None,
) -> _Measured:
    """Decode on an engine's own server, with the draft as it is exported and without."""
    assert evaluation.engine != "eyas"  # noqa: S101
    engine = find_engine(evaluation.engine, trained.target)
    setup, found = trained.load_draft()
    if sweep is not None:
        prompts = ask_engine(sweep, engine, trained, evaluation)
        evaluation = evaluation.model_copy(update={"num_prompts": len(prompts)})
    total = num_texts(min(len(prompts), evaluation.num_prompts), evaluation)
    title = f"decoding with {engine.title}"
    with (
        served_for(trained.target, setup.draft, prompts, evaluation, trained.path) as served,
        stage_progress(title, key=artifact_key(title), total=total, unit="texts") as bar,
    ):
        measured = measure_engine(
            engine,
            served,
            prompts,
            evaluation,
            stop_ids=trained.stop_ids,
            on_text=bar.advance,
        )
    return _Measured(
        step=found.step,
        before=[],
        after=measured.results,
        engine=measured.report,
        benchmarks=_by_set(sweep, prompts, [], measured.results, evaluation),
    )


def _by_set(
    sweep: Sweep | None,
    prompts: Sequence[Prompt],
    before: Sequence[PromptResult],
    after: Sequence[PromptResult],
    evaluation: EvaluationConfig,
) -> SweepReport | None:
    """Return the results by benchmark set; None without any."""
    if sweep is None:
        return None
    return sweep_report(sweep, prompts, before, after, draft_tokens=evaluation.drafted_depth)


def _prompts(trained: TrainedRun, evaluation: EvaluationConfig) -> list[Prompt]:
    """Return the prompts that leave room for their answers.

    Raises:
        ConfigError: none does, or one has a token that the target has no embedding for.

    """
    model_config = read_model_config(trained.target, locate(trained.target))
    prompts = _prompts_up_to(trained, evaluation)
    for prompt in prompts:
        require_embedded(
            prompt.input_ids, model_config.vocab_size, trained.target, where="a prompt"
        )
    positions = Positions.of(model_config)
    num_long, room = num_beyond(prompts, positions, evaluation.positions_after_prompt)
    if not num_long:
        return prompts
    shorter = evaluation.model_copy(update={"max_prompt_tokens": max(room, 0)})
    fitting = _prompts_up_to(trained, shorter)
    what = (
        f"{num_long} of {len(prompts)} prompts leave no room for {evaluation.max_new_tokens} new "
        f"tokens in the positions of target {trained.target.name}"
    )
    if not fitting:
        raise ConfigError(f"{what}, and no other is shorter; lower evaluation.max_new_tokens")
    logger.warning("%s: prompts of more than %d tokens are skipped", what, room)
    return fitting


def num_beyond(prompts: Sequence[Prompt], positions: Positions, new_tokens: int) -> tuple[int, int]:
    """Return how many prompts leave no room for `new_tokens`, and how long the others may be.

    Scaled positions are no limit.
    """
    if positions.limit is None or positions.is_scaled:
        return 0, 0
    room = positions.limit - new_tokens
    return sum(len(prompt.input_ids) > room for prompt in prompts), room


def _prompts_up_to(trained: TrainedRun, evaluation: EvaluationConfig) -> list[Prompt]:
    if evaluation.prompts is None:
        return sample_prompts(
            trained.held_out(),
            num_prompts=evaluation.num_prompts,
            max_tokens=evaluation.max_prompt_tokens,
            max_turns=evaluation.max_turns,
        )
    return first_prompts(
        read_prompts(evaluation.prompts, conversation_tokenizer(trained.target)),
        num_prompts=evaluation.num_prompts,
        max_tokens=evaluation.max_prompt_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Decodes the same prompts with one draft after the other."""

    model: TargetModel
    prompts: Sequence[Prompt]
    evaluation: EvaluationConfig
    stop_ids: Collection[int]

    def __call__(self, draft: DraftModel, *, title: str) -> list[PromptResult]:
        parts = self._parts()
        total = sum(config.num_prompts for _, config in parts)
        with stage_progress(title, key=artifact_key(title), total=total, unit="prompts") as bar:
            return [
                result
                for prompts, config in parts
                for result in decode_prompts(
                    self.model,
                    draft,
                    prompts,
                    config,
                    stop_ids=self.stop_ids,
                    on_progress=lambda _: bar.advance(),
                )
            ]

    def _parts(self) -> list[tuple[list[Prompt], EvaluationConfig]]:
        """Return the prompts of each benchmark set, all of them; or the first, if there is none."""
        parts = []
        for name, group in groupby(self.prompts, key=lambda prompt: prompt.benchmark):
            prompts = [*islice(group, None if name else self.evaluation.num_prompts)]
            config = self.evaluation.model_copy(update={"num_prompts": len(prompts)})
            parts.append((prompts, config))
        return parts or [([], self.evaluation)]


def inequality_warning(target: TargetConfig, *decoded: Sequence[PromptResult]) -> str:
    """Return a warning if greedy texts differ from plain decoding though float32 rounds too little.

    Empty in bfloat16, where rounding alone makes texts differ, and if all compared texts are equal.
    """
    results = [result for results in decoded for result in results if result.plain is not None]
    compared = [result for result in results if not result.sampled]
    num_unequal = sum(not result.matches_plain for result in compared)
    if for_decoding(target).dtype != "float32" or not num_unequal:
        return ""
    margins = [result.mismatch_margin or 0.0 for result in compared]
    return (
        f"{num_unequal} of {len(compared)} speculative texts of target {target.name} differ from "
        f"plain decoding (logits up to {max(margins):.1e} apart), though in float32 only ties of "
        "about 1e-4 may: do not rely on these figures; use `eyas run estimate RECIPE`"
    )


def _estimate(run_path: Path, step: int) -> AcceptanceEstimate | None:
    """Return the estimate from stored states for the checkpoint of `step`, if there is one."""
    found = RunRecord.read(run_path).estimate
    return found.estimate if found is not None and found.checkpoint_step == step else None
