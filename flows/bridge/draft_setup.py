"""The draft of one run: its vocabulary, and its weights before and after training."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.importing import read_draft, warm_start
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import (
    Coverage,
    DraftVocabulary,
    SourceCoverage,
    count_supervised_tokens,
)
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.model_config import aux_layers, read_model_config, resolve_device
from eagle_core.target.skeleton import reason_of
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.checkpoint import load_draft, newest
from eagle_core.training.config import CLOSED_FORM, RANDOM, TrainingConfig

VOCABULARY_NAME = "draft_vocabulary.safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftSetup:
    """An untrained draft, its run folder and the target's head."""

    run_path: Path
    draft: DraftModel
    target_lm_head: Tensor
    """[V, H] the target's head, frozen."""


def set_up_draft(target: TargetConfig, training: TrainingConfig, run_path: Path) -> DraftSetup:
    """Return the untrained draft of a run whose vocabulary exists.

    Reads two tensors of the target (embedding and head), not the layers between them.
    """
    folder = weights.locate(target)
    model_config = read_model_config(target, folder)
    device = resolve_device(target.device)
    embedding, lm_head = load_ends(folder, dtype=torch.float32)
    vocabulary = DraftVocabulary.load(run_path / VOCABULARY_NAME)
    config = DraftConfig.from_target(
        model_config,
        draft_vocab_size=len(vocabulary),
        fc_norm=training.fc_norm,
        norm_output=training.norm_output,
    )
    draft = DraftModel(config)
    draft.initialise(
        embedding=embedding, lm_head=lm_head, vocabulary=vocabulary, seed=training.seed
    )
    if training.start_folder is not None and newest(run_path) is None:
        _start_from(
            draft, training.start_folder, aux_layers(target, model_config.num_hidden_layers)
        )
    return DraftSetup(run_path=run_path, draft=draft.to(device), target_lm_head=lm_head.to(device))


def require_start(training: TrainingConfig) -> None:
    """Raise ConfigError if the draft to start from is not there."""
    folder = training.start_folder
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"training.start is {training.start}, and there is no such folder: give "
            f"{CLOSED_FORM}, {RANDOM}, or the folder of an EAGLE-3 draft"
        )


def require_draft_sizes(target: TargetConfig) -> None:
    """Raise ConfigError unless the sizes of a draft follow from the target's configuration."""
    model_config = read_model_config(target, weights.locate(target))
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


def _start_from(draft: DraftModel, folder: Path, layers: tuple[int, ...]) -> None:
    imported = read_draft(folder)
    if imported.aux_layers not in {None, layers}:
        raise MismatchError(
            f"the draft in {folder} reads the aux layers {imported.aux_layers}, but the states of "
            f"this target are of {layers}; set target.aux_layers, or start from another draft"
        )
    num_rows = warm_start(draft, imported)
    logger.info(
        "training starts from %s, which has the head rows of %d of %d draft tokens",
        folder,
        num_rows,
        draft.config.draft_vocab_size,
    )


def choose_vocabulary(
    target: TargetConfig, training: TrainingConfig, tokens: TokenFile, run_path: Path
) -> Coverage:
    """Choose the vocabulary of a run, once; return how much of the supervised tokens it covers.

    An existing vocabulary of other data or size is kept only if the run has a checkpoint. Whether
    the run may change its data is not decided here: the checkpoint records its snapshot id.
    """
    vocab_size = read_model_config(target, weights.locate(target)).vocab_size
    counted = _count(tokens, vocab_size)
    path, size = run_path / VOCABULARY_NAME, min(training.draft_vocab_size, vocab_size)
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
