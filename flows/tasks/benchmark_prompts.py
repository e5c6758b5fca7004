"""The prompts of benchmark sets: chosen before the target is loaded, then asked turn after turn."""

import logging
from contextlib import AbstractContextManager

from eagle_core.evaluation.benchmarks.dialogue import Answer, PromptLimits
from eagle_core.evaluation.benchmarks.sweep import Sweep
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.plain_answers import answers_by_engine, answers_here
from eagle_core.evaluation.prompts import Prompt
from eagle_core.serving.engine import Engine
from eagle_core.target.embedded_tokens import require_embedded
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import read_model_config
from eagle_core.target.positions import Positions
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.target.weights import locate
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.progress import StageProgress, stage_progress
from flows.tasks.served_draft import served_plainly
from flows.tasks.trained_run import TrainedRun

_TITLE = "answers to earlier turns"

logger = logging.getLogger(__name__)


def choose_sweep(trained: TrainedRun, evaluation: EvaluationConfig) -> Sweep | None:
    """Return the questions of the benchmark sets of an evaluation; None if it has none.

    Raises:
        ConfigError: a file is missing, is no such set, or has no question that is short enough.
        CorruptError: a file is damaged.
        TransientError: the hub is unreachable, and a file is not in its cache.

    """
    if not evaluation.benchmarks:
        return None
    positions = Positions.of(read_model_config(trained.target, locate(trained.target)))
    is_limited = positions.limit is not None and not positions.is_scaled
    sweep = Sweep.choose(
        evaluation.benchmark_sets,
        num_questions=evaluation.num_prompts,
        tokenizer=conversation_tokenizer(trained.target),
        limits=PromptLimits(
            asked=evaluation.max_prompt_tokens,
            room=(positions.limit or 0) - evaluation.positions_after_prompt if is_limited else None,
        ),
    )
    for one in sweep.sets:
        logger.info("benchmark %s: %s", one.name, one.source)
        if one.num_without_text:
            logger.warning(
                "benchmark %s: %d records hold no text, only a placeholder, and are passed over; "
                "fetch their texts with the tool that the data set's card names, and give its file "
                "as `path`",
                one.name,
                one.num_without_text,
            )
    return sweep


def ask_here(
    sweep: Sweep, model: TargetModel, trained: TrainedRun, evaluation: EvaluationConfig
) -> list[Prompt]:
    """Return the prompts of all turns; this process answers the earlier ones."""
    with _progress(sweep) as bar:
        answer = answers_here(model, evaluation, stop_ids=trained.stop_ids, on_text=bar.advance)
        return _asked(sweep, answer, trained)


def ask_engine(
    sweep: Sweep, engine: Engine, trained: TrainedRun, evaluation: EvaluationConfig
) -> list[Prompt]:
    """Return the prompts of all turns; a server without a draft answers the earlier ones."""
    if not sweep.num_answers:
        return _asked(sweep, _nothing, trained)
    served = served_plainly(
        trained.target, sweep.longest_answered(evaluation.max_new_tokens), evaluation
    )
    with (
        _progress(sweep) as bar,
        answers_by_engine(
            engine, served, evaluation, stop_ids=trained.stop_ids, on_text=bar.advance
        ) as answer,
    ):
        return _asked(sweep, answer, trained)


def _progress(sweep: Sweep) -> AbstractContextManager[StageProgress]:
    return stage_progress(_TITLE, key=artifact_key(_TITLE), total=sweep.num_answers, unit="texts")


def _nothing(_prompts: object) -> list[tuple[int, ...]]:
    return []


def _asked(sweep: Sweep, answer: Answer, trained: TrainedRun) -> list[Prompt]:
    prompts = sweep.prompts(answer, stop_ids=trained.stop_ids)
    vocab_size = read_model_config(trained.target, locate(trained.target)).vocab_size
    for prompt in prompts:
        require_embedded(prompt.input_ids, vocab_size, trained.target, where="a prompt")
    for one in sweep.sets:
        for reason, count in one.dialogues.left_out.items():
            logger.warning("benchmark %s: not asked, %s: %d", one.name, reason, count)
    return prompts
