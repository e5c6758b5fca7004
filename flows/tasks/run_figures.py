"""Gather what a run's checks need: its folder, its data, the store, the exports, the target.

Only reads, and what is missing becomes the reason why a check is not done.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from eagle_core.data.writer import Split
from eagle_core.diagnosis.agreement import EngineLength, Length, promised_length
from eagle_core.diagnosis.conversation_form import ConversationForm
from eagle_core.diagnosis.diagnosis import RunFigures
from eagle_core.diagnosis.draft_interface import Exports, NamedLayers
from eagle_core.diagnosis.learning import Accuracies, Seen
from eagle_core.diagnosis.position_range import PositionRange
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.importing import read_draft
from eagle_core.errors import ConfigError, CorruptError, EagleCoreError, MismatchError
from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.measure_engine import headline_setting
from eagle_core.evaluation.prompt_file import read_prompts
from eagle_core.evaluation.prompts import first_prompts, sample_prompts
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.fingerprint import fields_of_draft
from eagle_core.target.model_config import aux_layers, for_decoding, read_model_config
from eagle_core.target.positions import Positions
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import Checkpoint
from flows.bridge.conversation_form import conversation_form
from flows.bridge.draft_setup import DraftSetup, set_up_draft
from flows.bridge.exported_drafts import compare_exports, exported_folders
from flows.bridge.first_weights import as_begun, read_start
from flows.bridge.run import Run, read_run
from flows.bridge.stored_figures import StoredFigures, stored_figures
from flows.reports.run_record import ENGINES, RunRecord, evaluation_name
from flows.summaries import EvaluateSummary
from flows.tasks.trained_run import choose_checkpoint, load_checkpoint
from flows.workspace import Workspace

EXPORT_NAME = "export"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExaminedRun:
    """A run with its trained draft, whether or not it still fits its target and data."""

    path: Path
    space: Workspace
    run: Run
    target: TargetConfig
    """As it is now."""
    setup: DraftSetup
    checkpoint: Checkpoint

    def tokens(self, split: Split) -> TokenFile | str:
        """Return the tokens of a split, or why there are none: the file is gone, or damaged."""
        path = self.space.token_file(split, self.run.tokens)
        if not path.exists():
            return f"the run's token files are gone from {self.space.tokens_path}"
        try:
            return TokenFile(path)
        except CorruptError as error:
            return str(error)

    @property
    def layers(self) -> tuple[int, int, int]:
        """Aux layers that it was trained on."""
        low, middle, high = json.loads(self.run.target_fields["aux_layers"])
        return (low, middle, high)


def examined_run(
    target: TargetConfig, space: Workspace, name: str, evaluation: EvaluationConfig
) -> ExaminedRun:
    """Return a run and the draft of its checkpoint.

    Unlike `open_run`, it does not refuse another target or template: the checks name these.

    Raises:
        ConfigError: there is no such run, it has no checkpoint, or it is of an older version.
        MismatchError: the target has other sizes than the run's draft.

    """
    path = space.run_path(name)
    run = read_run(path)
    if run is None:
        found = sorted(one.parent.name for one in path.parent.glob("*/run.json"))
        raise ConfigError(
            f"there is no run in {path} (it has no run.json); runs there: "
            f"{', '.join(found) or 'none'}. Name one with --run or by its folder; `eyas run train` "
            "writes the file for a run of an older version"
        )
    folder = choose_checkpoint(path, evaluation.checkpoint)
    _require_fit(target, run, folder)
    setup = set_up_draft(target, run.training, path)
    return ExaminedRun(
        path=path,
        space=space,
        run=run,
        target=target,
        setup=setup,
        checkpoint=load_checkpoint(setup, folder),
    )


def _require_fit(target: TargetConfig, run: Run, folder: Path) -> None:
    """Raise MismatchError unless a draft for `target` has the shape of the checkpoint's."""
    saved = checkpoint.read(folder).identity["draft"]
    fitting = DraftConfig.from_target(
        read_model_config(target, weights.locate(target)),
        draft_vocab_size=saved["draft_vocab_size"],
        settings=run.settings_of_draft,
    ).identity()
    if "rope_scaling" not in saved:  # a run of an older version keeps its plain embedding
        fitting.pop("rope_scaling", None)
    differing = [
        f"{name} is {fitting.get(name)}, in the run {saved.get(name)}"
        for name in sorted(saved.keys() | fitting.keys())
        if saved.get(name) != fitting.get(name)
    ]
    if differing:
        raise MismatchError(f"the run's draft does not fit this target: {'; '.join(differing)}")


def run_figures(
    examined: ExaminedRun,
    root: str,
    evaluation: EvaluationConfig,
    *,
    export: Path | None = None,
) -> tuple[RunFigures, StoredFigures]:
    """Return the figures of a run, without those that need its whole target."""
    run, setup, found = examined.run, examined.setup, examined.checkpoint
    record = RunRecord.read(examined.path)
    train, held_out = examined.tokens("train"), examined.tokens("held_out")
    stored = (
        StoredFigures.unknown("the run stores no states")
        if run.store_root is None
        else stored_figures(
            root, run, examined.target, setup, None if isinstance(held_out, str) else held_out
        )
    )
    decoded = _of_step(record.evaluation, found.step)
    if decoded is not None and decoded.evaluation.tree is not None:
        decoded = None  # neither an engine nor the estimate drafts trees
    draft_tokens = (decoded.evaluation if decoded else evaluation).draft_tokens
    model_config = read_model_config(examined.target, weights.locate(examined.target))
    positions = Positions.of(model_config)
    lengths = train if isinstance(train, str) else train.lengths
    figures = RunFigures(
        step=found.step,
        target_changes=_changes(examined),
        form=train if isinstance(train, str) else _form(examined, train),
        layers=_layers(examined, model_config.num_hidden_layers, stored),
        exports=_exports(examined, export),
        states_fault=stored.fault,
        why_no_states=stored.why_unknown,
        layer_errors=(),
        training_choices=stored.training_choices,
        held_out_choices=stored.held_out_choices,
        vocabulary_size=setup.draft.config.draft_vocab_size,
        training_coverage=run.vocabulary_coverage,
        draft_tokens=draft_tokens,
        accuracies=_accuracies(stored, found),
        seen=_seen(examined, record, train),
        recorded_length=_recorded_length(found),
        recorded_prefixes=_recorded_prefixes(found),
        num_cut=lengths
        if isinstance(lengths, str)
        else int((lengths >= run.dataset.max_length).sum()),
        num_samples=0 if isinstance(lengths, str) else len(lengths),
        max_length=run.dataset.max_length,
        positions=PositionRange(
            longest_trained=lengths if isinstance(lengths, str) else int(lengths.max()),
            longest_decoded=_longest_decoded(examined, decoded, held_out),
            target_limit=positions.limit,
            is_scaled=positions.is_scaled,
            window=None
            if setup.draft.config.sliding_window is not None
            else as_begun(run.training, examined.path).piece_tokens,
        ),
        decoded=None if decoded is None else _length(decoded.trained),
        replayed=_replayed(record, found.step, draft_tokens),
        decoding_warning=decoded.warning if decoded else "",
        engine=_engine_length(examined.target, record, decoded),
        overfit=None,
    )
    return figures, stored


def _changes(examined: ExaminedRun) -> tuple[str, ...]:
    now = fields_of_draft(examined.target, weights.locate(examined.target))
    recorded = examined.run.target_fields
    names = ("weights", "norm_convention")
    return tuple(name.replace("_", " ") for name in names if recorded.get(name) != now[name])


def _form(examined: ExaminedRun, train: TokenFile) -> ConversationForm | str:
    try:
        return conversation_form(examined.target, examined.run, train)
    except ConfigError as error:  # of the tokenizer
        return str(error)


def _layers(examined: ExaminedRun, num_layers: int, stored: StoredFigures) -> NamedLayers:
    start = examined.run.training.start_folder
    given = None
    if start is not None and not examined.run.training.refit:
        try:
            given = read_draft(start).aux_layers
        except EagleCoreError:  # it is gone, or unreadable by now
            start = None
    return NamedLayers(
        run=examined.layers,
        target=aux_layers(examined.target, num_layers),
        store=stored.aux_layers,
        start=given,
        has_given_start=start is not None and not examined.run.training.refit,
    )


def _exports(examined: ExaminedRun, export: Path | None) -> Exports | str:
    folders = exported_folders(export or examined.path / EXPORT_NAME)
    if export is not None and not folders:
        raise ConfigError(f"{export} is no export: it has no config.json, nor has a folder in it")
    return compare_exports(folders, examined.setup.draft, examined.layers)


def _seen(examined: ExaminedRun, record: RunRecord, train: TokenFile | str) -> Seen:
    """Return the tokens up to the checkpoint, from its place in the data."""
    loader, start = examined.checkpoint.loader, read_start(examined.path)
    if start is None and record.training is not None:  # of a run whose record is older
        start = record.training.start
    if record.settings is not None:
        num_tokens, num_samples = (
            record.settings.train.num_tokens,
            record.settings.train.num_samples,
        )
    else:
        num_tokens = 0 if isinstance(train, str) else int(train.lengths.sum())
        num_samples = 0 if isinstance(train, str) else len(train)
    passes = loader.epoch + loader.next_sample / max(num_samples, 1)
    return Seen(
        num_tokens=round(passes * num_tokens),
        num_data_tokens=num_tokens,
        is_solved=start is not None and not start.is_drawn,
    )


def _accuracies(stored: StoredFigures, found: Checkpoint) -> Accuracies | str:
    """Return those on stored states; without a store, those that training recorded."""
    figures, length = found.figures, _recorded_length(found)
    is_recorded = length is not None and figures.get("step_accuracies")
    if not isinstance(stored.accuracies, str) or length is None or not is_recorded:
        return stored.accuracies
    return Accuracies(
        training=figures["step_accuracies"][0],
        held_out=figures["held_out_accuracies"][0],
        held_out_length=length,
        held_out_prefixes=_recorded_prefixes(found),
    )


def _recorded_length(found: Checkpoint) -> float | None:
    figures = found.figures
    return float(figures["held_out_length"]) if figures.get("held_out_step") == found.step else None


def _recorded_prefixes(found: Checkpoint) -> tuple[float, ...]:
    if _recorded_length(found) is None:
        return ()
    return tuple(found.figures.get("held_out_joint_prefix_accuracies") or ())


def _of_step(evaluation: EvaluateSummary | None, step: int) -> EvaluateSummary | None:
    is_same = evaluation is not None and evaluation.checkpoint_step == step
    return evaluation if is_same else None


def _longest_decoded(
    examined: ExaminedRun, decoded: EvaluateSummary | None, held_out: TokenFile | str
) -> int | None:
    """Return the tokens of the longest context that `evaluate` may decode, if known."""
    if decoded is None:
        return None
    config = decoded.evaluation
    if config.benchmarks:  # their later turns are known only after decoding
        return None
    if config.prompts is None:
        prompts = sample_prompts(
            () if isinstance(held_out, str) else held_out,
            num_prompts=config.num_prompts,
            max_tokens=config.max_prompt_tokens,
            max_turns=config.max_turns,
        )
    elif Path(config.prompts).is_file():
        prompts = first_prompts(
            read_prompts(config.prompts, conversation_tokenizer(examined.target)),
            num_prompts=config.num_prompts,
            max_tokens=config.max_prompt_tokens,
        )
    else:  # nothing is downloaded for this
        return None
    longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
    return longest + config.max_new_tokens if longest else None


def _length(report: AcceptanceReport) -> Length:
    low, high = report.acceptance_interval
    return Length(length=report.acceptance_length, low=low, high=high)


def _engine_length(
    target: TargetConfig, record: RunRecord, decoded: EvaluateSummary | None
) -> EngineLength | str | None:
    """Return what an engine counted for the same prompts; the lowest, if there are several.

    If there is none, a text if that is because of files of another version of Eyas.
    """
    outdated = [name for name in map(evaluation_name, ENGINES) if name in record.outdated]
    unknown = f"{' and '.join(outdated)}: of another version of Eyas" if outdated else None
    if decoded is None:
        return unknown
    own_dtype = for_decoding(target).dtype
    found = [
        EngineLength(
            engine=summary.engine.engine,
            length=_length(summary.trained),
            own=_length(decoded.trained),
            is_sampled=decoded.evaluation.temperature > 0,
            is_exact=own_dtype == summary.engine.dtype == "float32",
        )
        for summary in record.by_engine
        if summary.engine is not None
        and summary.checkpoint_step == decoded.checkpoint_step
        and _decodes_like(summary.evaluation, decoded.evaluation)
    ]
    if not found:
        return unknown
    return min(found, key=lambda one: (not one.length.is_known, one.length.length))


def _decodes_like(one: EvaluationConfig, other: EvaluationConfig) -> bool:
    """Return whether both evaluations decode the same prompts in the same way."""
    speed = {
        *("engine", "concurrency", "draft_lengths", "draft_p_min"),
        *("num_plain_prompts", "batch_prompts"),
    }
    return one.model_dump(exclude=speed) == other.model_dump(exclude=speed) and headline_setting(
        one
    ) == headline_setting(other)


def _replayed(record: RunRecord, step: int, draft_tokens: int) -> Length | str | None:
    found = record.estimate
    if found is None or found.checkpoint_step != step:
        return None
    return promised_length(found.estimate, draft_tokens=draft_tokens)
