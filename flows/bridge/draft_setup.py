"""The draft of one run: its vocabulary, and its weights before and after training."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from transformers import PretrainedConfig

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.importing import ImportedDraft, read_draft, require_fit, warm_start
from eagle_core.draft.model import DraftModel
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.draft.vocabulary import (
    Coverage,
    DraftVocabulary,
    SourceCoverage,
    count_supervised_tokens,
)
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.target import weights
from eagle_core.target.capture import CapturingTarget
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.model_config import (
    are_aux_layers,
    aux_layers,
    default_aux_layers,
    read_model_config,
    resolve_device,
)
from eagle_core.target.placement import load_target
from eagle_core.target.skeleton import reason_of
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.checkpoint import load_draft, newest, read
from eagle_core.training.config import CLOSED_FORM, RANDOM, TrainingConfig

VOCABULARY_NAME = "draft_vocabulary.safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refit:
    """What the fusing matrix of a given draft is to be solved from."""

    layers: tuple[int, ...]
    """Aux layers that the draft was trained on."""
    load_target: Callable[[], CapturingTarget]
    """Returns the target, for their states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftSetup:
    """An untrained draft, its run folder and the target's head."""

    run_path: Path
    draft: DraftModel
    target_lm_head: Tensor
    """[V, H] the target's head, frozen, on the CPU: training needs only some of its rows."""
    refit: Refit | None = None
    """None unless the draft was given and reads other aux layers."""


def set_up_draft(
    target: TargetConfig,
    training: TrainingConfig,
    run_path: Path,
    settings: DraftSettings | None = None,
) -> DraftSetup:
    """Return the untrained draft of a run whose vocabulary exists.

    Reads two tensors of the target (embedding and head), not the layers between them. Without
    `settings` the draft is that of the run's checkpoint.

    Raises:
        ConfigError: the settings contradict each other.
        MismatchError: the run's draft is of a target of other sizes, or the given draft differs.

    """
    folder = weights.locate(target)
    model_config = read_model_config(target, folder)
    device = resolve_device(target.device)
    embedding, lm_head = load_ends(folder, dtype=torch.float32)
    vocabulary = DraftVocabulary.load(run_path / VOCABULARY_NAME)
    draft = DraftModel(_draft_config(settings, run_path, model_config, len(vocabulary)))
    draft.initialise(
        embedding=embedding, lm_head=lm_head, vocabulary=vocabulary, seed=training.seed
    )
    refit = None
    if training.start_folder is not None and newest(run_path) is None:
        given = read_draft(training.start_folder)
        others = _other_layers(given, target, training, model_config)
        if others is not None:
            refit = Refit(layers=others, load_target=partial(load_target, target))
        _start_from(draft, given, training.start_folder)
    return DraftSetup(
        run_path=run_path,
        draft=draft.to(device),
        target_lm_head=lm_head,
        refit=refit,
    )


def require_start_fits(
    target: TargetConfig, training: TrainingConfig, run_path: Path, settings: DraftSettings
) -> None:
    """Raise MismatchError if a run that has not begun is to start from a draft that does not fit.

    It has other sizes, or reads other layers. The target's configuration must be at hand.
    """
    if newest(run_path) is not None:
        return
    model_config = read_model_config(target, weights.locate(target))
    DraftConfig.from_target(
        model_config, draft_vocab_size=training.draft_vocab_size, settings=settings
    )
    if training.start_folder is None:
        return
    given = read_draft(training.start_folder)
    _other_layers(given, target, training, model_config)
    size = given.config.draft_vocab_size
    require_fit(_draft_config(settings, run_path, model_config, size), given)


def require_start(training: TrainingConfig, run_path: Path) -> None:
    """Raise ConfigError if a run that has not begun is to start from a draft that is not there."""
    folder = training.start_folder
    if folder is not None and not folder.is_dir() and newest(run_path) is None:
        raise ConfigError(
            f"training.start is {training.start}, and there is no such folder: give "
            f"{CLOSED_FORM}, {RANDOM}, or the folder of an EAGLE-3 draft"
        )


def require_draft_sizes(target: TargetConfig) -> None:
    """Raise ConfigError unless the sizes of a draft follow from the target's configuration."""
    model_config = read_model_config(target, weights.locate_description(target))
    try:
        DraftConfig.from_target(model_config, draft_vocab_size=model_config.vocab_size)
    except (AttributeError, TypeError, ArithmeticError, RuntimeError, ValidationError) as error:
        raise ConfigError(
            f"target {target.name}: no draft can be made for a {model_config.model_type} model, "
            "whose configuration lacks a size of the draft; choose another target: "
            f"{reason_of(error)}"
        ) from error


def load_trained(setup: DraftSetup) -> DraftModel:
    """Load the run's newest good checkpoint into its draft; ConfigError if there is none."""
    load_draft(setup.draft, setup.run_path)
    return setup.draft


def _draft_config(
    settings: DraftSettings | None,
    run_path: Path,
    model_config: PretrainedConfig,
    draft_vocab_size: int,
) -> DraftConfig:
    begun = begun_draft(run_path)
    if settings is None and begun is not None:
        return _fitting(begun, model_config, run_path)
    wanted = DraftConfig.from_target(
        model_config, draft_vocab_size=draft_vocab_size, settings=settings or PLAIN_DRAFT
    )
    if begun is None:
        return wanted
    if wanted.target_head != begun.target_head:
        raise MismatchError(
            f"the run in {run_path} began with draft.target_head={str(begun.target_head).lower()}; "
            "restore it, or train under another run name"
        )
    return wanted.model_copy(update=_kept(begun, wanted, settings or PLAIN_DRAFT))


def _kept(begun: DraftConfig, wanted: DraftConfig, settings: DraftSettings) -> dict[str, Any]:
    """Return what a run that has begun keeps, where older versions chose something else."""
    kept: dict[str, Any] = {}
    if begun.rope_scaling is None and wanted.rope_scaling is not None:
        logger.info("the draft of the run began with a plain rotary embedding, and keeps it")
        kept["rope_scaling"] = None
    if settings.num_attention_heads is None and settings.num_key_value_heads is None:
        heads = ("num_attention_heads", "num_key_value_heads")
        kept |= {name: getattr(begun, name) for name in heads}
    return kept


def begun_draft(run_path: Path) -> DraftConfig | None:
    """Return the sizes of a run's draft, from its newest checkpoint; None before the first."""
    folder = newest(run_path)
    if folder is None:
        return None
    return DraftConfig.of_identity(read(folder).identity["draft"], where=folder)


def _fitting(begun: DraftConfig, model_config: PretrainedConfig, run_path: Path) -> DraftConfig:
    """Return the sizes of the run's draft; MismatchError if the target has others than its own."""
    own = {"width": begun.target_hidden_size, "vocabulary": begun.vocab_size}
    now = {"width": model_config.hidden_size, "vocabulary": model_config.vocab_size}
    facts = [f"{name} {own[name]} (now {now[name]})" for name in own if own[name] != now[name]]
    if facts:
        raise MismatchError(
            f"the draft in {run_path} is of a target with {', '.join(facts)}; name the run's own "
            "target"
        )
    return begun


def _other_layers(
    given: ImportedDraft,
    target: TargetConfig,
    training: TrainingConfig,
    model_config: PretrainedConfig,
) -> tuple[int, ...] | None:
    """Return the aux layers of a given draft that is to be refit; None if there is no need.

    A draft that does not name its layers is taken to read those of the target; or, if it is to be
    refit, those of EAGLE-3.
    """
    num_layers = model_config.num_hidden_layers
    ours, theirs = aux_layers(target, num_layers), given.aux_layers
    if training.refit and theirs is None:
        theirs = default_aux_layers(num_layers)
    if theirs in {None, ours}:
        return None
    if not training.refit:
        raise MismatchError(
            f"the draft in {training.start} reads the aux layers {theirs}, but the states of "
            f"this target are of {ours}; set target.aux_layers, or training.refit=true to solve "
            "its fusing matrix for these layers, or start from another draft"
        )
    if not are_aux_layers(theirs, num_layers):
        raise MismatchError(
            f"the draft in {training.start} names the aux layers {theirs}; expected three of the "
            f"{num_layers} layers of target {target.name}, from 0, ascending; start from another "
            "draft"
        )
    return theirs


def _start_from(draft: DraftModel, given: ImportedDraft, folder: Path) -> None:
    num_rows = warm_start(draft, given)
    logger.info(
        "training starts from %s, which has the head rows of %d of %d draft tokens",
        folder,
        num_rows,
        draft.config.draft_vocab_size,
    )


def choose_vocabulary(
    target: TargetConfig,
    training: TrainingConfig,
    tokens: TokenFile,
    run_path: Path,
    settings: DraftSettings = PLAIN_DRAFT,
) -> Coverage:
    """Choose the vocabulary of a run, once; return how much of the supervised tokens it covers.

    An existing vocabulary of other data or size is kept only if the run has a checkpoint. Whether
    the run may change its data is not decided here: the checkpoint records its snapshot id.
    """
    vocab_size = read_model_config(target, weights.locate(target)).vocab_size
    counted = _count(tokens, vocab_size)
    path = run_path / VOCABULARY_NAME
    size = vocab_size if settings.target_head else min(training.draft_vocab_size, vocab_size)
    if path.exists():
        found = DraftVocabulary.load(path)
        is_wanted = found.source_id == tokens.path.stem and len(found) == size
        if is_wanted or newest(run_path) is not None:
            return _coverage(found, counted)
        logger.info("no step was trained with the draft vocabulary in %s: it is rebuilt", path)
    vocabulary = DraftVocabulary.build(
        counted.counts,
        size=size,
        always=special_tokens(target, vocab_size),
        source_id=tokens.path.stem,
    )
    run_path.mkdir(parents=True, exist_ok=True)
    vocabulary.save(path)
    return _coverage(vocabulary, counted)


def special_tokens(target: TargetConfig, vocab_size: int) -> list[int]:
    """Return the tokens that every draft vocabulary of this target has."""
    special = conversation_tokenizer(target).special_token_ids()
    return [number for number in special if number < vocab_size]  # some have no embedding


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Counted:
    """Supervised tokens of a token file."""

    counts: NDArray[np.int64]
    """[V]"""
    by_source: Mapping[str, tuple[int, NDArray[np.int64]]]
    """Samples and [V] counts of each of several sources; empty for one."""


def _count(tokens: TokenFile, vocab_size: int) -> _Counted:
    rows_by_source = tokens.rows_by_source()
    if not rows_by_source:
        return _Counted(counts=count_supervised_tokens(tokens, vocab_size), by_source={})
    by_source = {
        name: (len(rows), count_supervised_tokens(map(tokens.fetch, rows.tolist()), vocab_size))
        for name, rows in rows_by_source.items()
    }
    counts = np.sum([counts for _, counts in by_source.values()], axis=0)
    return _Counted(counts=counts, by_source=by_source)


def _coverage(vocabulary: DraftVocabulary, counted: _Counted) -> Coverage:
    return Coverage(
        share=vocabulary.coverage(counted.counts),
        by_source={
            name: SourceCoverage(
                num_samples=num_samples,
                num_supervised=int(counts.sum()),
                share=vocabulary.coverage(counts),
            )
            for name, (num_samples, counts) in counted.by_source.items()
        },
    )
