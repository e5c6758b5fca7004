"""Overfit a fresh draft on a few texts of the target, and decode the same texts for real.

A draft that knows its texts by heart has nearly every token accepted, unless training and decoding
disagree about positions, states or masks. The answers are the target's own greedy ones: with
another author's, decoding leaves the texts at once. Nothing outside the given folder is written.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.closed_form.state_sizes import measure_state_sizes
from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_plain
from eagle_core.diagnosis.agreement import LEARNT, LENGTH_TO_REACH, OverfitResult
from eagle_core.diagnosis.draft_interface import LayerError
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary, count_supervised_tokens
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import summarise
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts
from eagle_core.evaluation.prompts import Prompt
from eagle_core.samples import HiddenStateSample, TokenizedSample, sample_id
from eagle_core.target.capture import capture_states
from eagle_core.target.model import TargetModel
from eagle_core.tracking.tracker import NoTracker
from eagle_core.training.config import RANDOM, RATE_OF_DRAWN_WEIGHTS, TrainingConfig
from eagle_core.training.distributed import ONE_PROCESS
from eagle_core.training.packing import pack
from eagle_core.training.trainer import train

NUM_TEXTS = 4
DRAFT_TOKENS = 5
MOST_STEPS = 600
_STEPS_AT_ONCE = 50
_DECODED_TOKENS = 48
_WRITTEN_TOKENS = _DECODED_TOKENS + DRAFT_TOKENS + 2
"""What the last round drafts behind the decoded tokens is trained on too."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TargetEnds:
    """The two matrices of the target that a draft begins with."""

    embedding: Tensor
    """[V, H], on the device to train on"""
    lm_head: Tensor
    """[V, H], on any device"""


class _InMemory:
    """Serves the samples it was given."""

    source_id = "overfitting"

    def __init__(self, samples: Sequence[HiddenStateSample]) -> None:
        self._samples = samples

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(sample) for sample in self._samples], dtype=np.int64)

    @property
    def groups(self) -> NDArray[np.int64]:
        return np.zeros(len(self._samples), dtype=np.int64)

    def origin(self, sample_id: str) -> str:
        return f"text {sample_id[:8]}"

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
        pass

    def fetch(self, index: int) -> HiddenStateSample:
        return self._samples[index]


def overfit_texts(
    target: TargetModel,
    ends: TargetEnds,
    draft_config: DraftConfig,
    training: TrainingConfig,
    prompts: Sequence[Prompt],
    *,
    stop_ids: Collection[int],
    folder: Path,
    on_step: Callable[[int], None] = lambda _step: None,
) -> OverfitResult:
    """Train a fresh draft on the target's answers to `prompts`, and decode these prompts.

    Objective, norms and optimizer are those of `training`; length, first weights, rate and
    vocabulary are not: they shall suffice for these texts.

    Raises:
        ConfigError: no prompt, or none with an answer of two tokens.

    """
    written = DecodingConfig(max_new_tokens=_WRITTEN_TOKENS)
    texts = [generate_plain(target, one.input_ids, written, stop_ids).tokens for one in prompts]
    kept = [(one, text) for one, text in zip(prompts, texts, strict=True) if len(text) > 2]
    if not kept:
        raise ConfigError("the target answers no prompt with more than two tokens")
    samples = [_sample(one, text) for one, text in kept]
    states = list(capture_states(target, samples))
    draft = _fresh_draft(ends, draft_config, training, samples, states)
    chosen = [one for one, _ in kept]
    length, num_steps = 0.0, 0
    accuracies: tuple[float, ...] = ()
    for num_steps, accuracies in _training(draft, ends, training, states, folder, on_step):
        if min(accuracies) >= LEARNT or num_steps == MOST_STEPS:
            length = _decoded_length(target, draft, chosen, stop_ids)
        if length > LENGTH_TO_REACH:
            break
    return OverfitResult(
        num_texts=len(kept),
        num_steps=num_steps,
        draft_tokens=DRAFT_TOKENS,
        training_accuracies=accuracies,
        length=length,
    )


def _decoded_length(
    target: TargetModel, draft: DraftModel, prompts: Sequence[Prompt], stop_ids: Collection[int]
) -> float:
    """Return the tokens per target forward, with every depth weighed by its own verdicts."""
    decoding = EvaluationConfig(
        num_prompts=len(prompts),
        num_plain_prompts=0,
        draft_tokens=DRAFT_TOKENS,
        max_new_tokens=_DECODED_TOKENS,
    )
    results = list(decode_prompts(target, draft, prompts, decoding, stop_ids=stop_ids))
    return 1 + sum(summarise(results, draft_tokens=DRAFT_TOKENS).acceptance_to_depth)


def layer_errors(
    target: TargetModel, stored: HiddenStateSample, layers: Sequence[int]
) -> tuple[LayerError, ...]:
    """Compare the stored states of `layers` with those of every layer of the target."""
    every = range(target.model_config.num_hidden_layers)
    sample = TokenizedSample(
        sample_id=stored.sample_id, input_ids=stored.input_ids, loss_mask=stored.loss_mask
    )
    (computed,) = capture_states(target, [sample], layers=every)
    states = _floats(computed.aux_hidden_states)
    errors = []
    for place, layer in enumerate(layers):
        own = _floats(stored.aux_hidden_states)[:, place]
        relative = [
            float(np.linalg.norm(own - states[:, one]) / np.linalg.norm(states[:, one]))
            for one in every
        ]
        errors.append(
            LayerError(
                layer=layer, relative_error=relative[layer], nearest=int(np.argmin(relative))
            )
        )
    return tuple(errors)


def _floats(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = from_bfloat16_bits(bits, dtype=torch.float32).numpy()
    return values


def _sample(prompt: Prompt, text: Sequence[int]) -> TokenizedSample:
    ids = np.array([*prompt.input_ids, *text], dtype=np.int32)
    mask = np.arange(len(ids)) >= len(prompt.input_ids)
    return TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)


def _fresh_draft(
    ends: TargetEnds,
    config: DraftConfig,
    training: TrainingConfig,
    samples: Sequence[TokenizedSample],
    states: Sequence[HiddenStateSample],
) -> DraftModel:
    """Return a draft with drawn weights and a vocabulary that has every token of the texts."""
    counts = count_supervised_tokens(samples, config.vocab_size)
    size = max(config.draft_vocab_size, int((counts > 0).sum()))
    draft = DraftModel(config.model_copy(update={"draft_vocab_size": size}))
    draft.initialise(
        embedding=ends.embedding.cpu(),
        lm_head=ends.lm_head.cpu(),
        vocabulary=DraftVocabulary.build(counts, size=size),
        seed=training.seed,
    )
    draft = draft.to(ends.embedding.device)
    sizes = measure_state_sizes(draft, [pack(states)], training, ONE_PROCESS)
    draft.aux_scale.copy_(sizes.aux_scale)
    return draft


def _training(
    draft: DraftModel,
    ends: TargetEnds,
    training: TrainingConfig,
    states: Sequence[HiddenStateSample],
    folder: Path,
    on_step: Callable[[int], None],
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Train, and yield after every few steps their number and the accuracies by step of TTT."""
    source = _InMemory(states)
    config = training.model_copy(
        update={
            "start": RANDOM,
            "refit": False,
            "ttt_length": max(training.ttt_length, DRAFT_TOKENS),
            "learning_rate": RATE_OF_DRAWN_WEIGHTS,
            "schedule": "constant",
            "batch_tokens": int(source.lengths.sum()),
            "window_tokens": None,
            "batches_per_step": 1,
            "max_positions_per_sample": None,
            "num_processes": 1,
            "nodes": 1,
            "compile": False,
            "checkpoint_every": MOST_STEPS,
            "keep_last": 1,
        }
    )
    for steps in range(_STEPS_AT_ONCE, MOST_STEPS + 1, _STEPS_AT_ONCE):
        result = train(
            config=config.model_copy(update={"max_steps": steps}),
            draft=draft,
            target_lm_head=ends.lm_head,
            source=source,
            held_out=None,
            run_path=folder,
            tracker=NoTracker(),
            on_progress=lambda progress: on_step(progress.step),
        )
        if result.stopped:  # by SIGTERM, which training takes for itself
            raise KeyboardInterrupt
        yield result.num_steps, result.figures.step_accuracies[:DRAFT_TOKENS]
