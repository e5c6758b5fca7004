"""The draft of a run, exported for an engine, and its target as engines load it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

from eagle_core.atomic_files import partial_folder
from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig
from eagle_core.draft.model import DraftModel
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.measure_engine import concurrencies
from eagle_core.evaluation.prompts import Prompt
from eagle_core.serving.served import Served
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import aux_layers, for_decoding, read_model_config


def served_target(target: TargetConfig) -> ServedTarget:
    """Return the target as engines load it: by its hub id, or by the full path of a local model."""
    folder = weights.locate(target)
    model_config = read_model_config(target, folder)
    is_package = target.model.startswith(weights.PACKAGE_SCHEME)
    is_local = is_package or Path(target.model).expanduser().exists()
    return ServedTarget.of(
        model_config,
        name_or_path=str(folder.resolve()) if is_local else target.model,
        aux_layers=aux_layers(target, model_config.num_hidden_layers),
    )


@contextmanager
def served_for(
    target: TargetConfig,
    draft: DraftModel,
    prompts: Sequence[Prompt],
    evaluation: EvaluationConfig,
    run_path: Path,
) -> Iterator[Served]:
    """Yield what an engine serves to evaluate a draft; its export is gone after the block."""
    decided = for_decoding(target)
    with partial_folder(run_path) as folder:
        config = ExportConfig(
            layouts=("serving",),
            dtype=cast("Literal['float32', 'bfloat16']", decided.dtype),
        )
        written = export(draft, served_target(target), folder, config)
        yield Served(
            target=decided,
            weights=weights.locate(target).resolve(),
            draft=written["serving"].resolve(),
            draft_tokens=evaluation.draft_tokens,
            slots=max(concurrencies(evaluation, len(prompts))),
            max_length=_longest(prompts, evaluation),
        )


def served_plainly(
    target: TargetConfig, longest_prompt: int, evaluation: EvaluationConfig
) -> Served:
    """Return what an engine serves to answer prompts without a draft, one at a time."""
    return Served(
        target=for_decoding(target),
        weights=weights.locate(target).resolve(),
        max_length=longest_prompt + evaluation.positions_after_prompt,
    )


def _longest(prompts: Sequence[Prompt], evaluation: EvaluationConfig) -> int:
    """Return the tokens of the longest text, with the drafts of its last rounds."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    return longest + evaluation.positions_after_prompt
