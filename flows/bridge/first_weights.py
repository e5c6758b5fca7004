"""The first weights of a run: made once, kept in its folder, and the same for every attempt.

`start/` has the draft before the first step (`draft.safetensors`) and what is known of it
(`start.json`). A run of an earlier version has no such folder; its first weights were drawn.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_core.atomic_files import atomic_folder, file_digest
from eagle_core.closed_form.refit import refit_fusing_matrix
from eagle_core.closed_form.sampled_batches import SampledBatches
from eagle_core.closed_form.start import solve_start, tokens_needed, why_not_solved
from eagle_core.closed_form.state_sizes import measure_state_sizes
from eagle_core.draft.model import DraftModel
from eagle_core.errors import DiskError
from eagle_core.samples import SampleSource
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import newest
from eagle_core.training.config import (
    CLOSED_FORM,
    RANDOM,
    RATE_OF_DRAWN_WEIGHTS,
    RATE_OF_GIVEN_WEIGHTS,
    WHOLE_SAMPLES,
    TrainingConfig,
)
from eagle_core.training.distributed import ONE_PROCESS, Processes
from eagle_core.training.packing import PackedBatch
from eagle_core.training.pieces import WHOLE, Windows
from eagle_core.training.precision import multiplying_dtype
from eagle_core.training.result import Start
from eagle_core.training.validation import (
    HeldOutFigures,
    held_out_batches,
    measure,
    measuring_step,
)
from flows.bridge.draft_setup import DraftSetup
from flows.bridge.known_aux import known_aux

SHARED_SECONDS = 90.0
"""After this, even a network file system shows what another machine has written."""
_FOLDER = "start"
_WEIGHTS_NAME = "draft.safetensors"
_RECORD_NAME = "start.json"
_SCALE_TOKENS = 16384
"""Tokens from which the sizes of the aux channels are measured if nothing is solved."""
_BATCH_TOKENS = 4096
_OWN_TOKENS = 16384
"""Tokens of its own sample on which a solution is measured if nothing is held out."""
_SOLVED_WITH = ("ttt_length", "loss_positions", "seed", "shuffle_window")
"""Settings that decide what is solved, beside the drawn draft."""

logger = logging.getLogger(__name__)


class _Record(BaseModel):
    """Content of `start.json`."""

    model_config = ConfigDict(frozen=True)

    identity: str
    """Digest of what the first weights depend on."""
    weights_digest: str
    """xxh3_128 of `draft.safetensors`."""
    start: Start


def first_weights(
    setup: DraftSetup,
    source: SampleSource,
    held_out: SampleSource | None,
    training: TrainingConfig,
    processes: Processes = ONE_PROCESS,
    *,
    refetch: bool = True,
) -> Start | None:
    """Give the draft its first weights, and record them in the run's folder.

    Nothing happens if the run has a checkpoint, whose weights the trainer loads. An interrupted
    attempt starts over; one that ended is read.

    Args:
        setup: the drawn draft, or one read from a folder; it is changed.
        source: the training samples.
        held_out: samples to measure on, if any.
        training: settings of the run.
        processes: all of which call this; the first writes.
        refetch: whether `source` may be read several times (`SampledBatches`).

    Returns:
        The record, or None for a run of an earlier version.

    """
    if newest(setup.run_path) is not None:
        return read_start(setup.run_path)
    identity = _identity(setup, source, training)
    found = _read(setup.run_path)
    is_usable = found is not None and found.identity == identity and load_first_weights(setup)
    if processes.any(not is_usable):
        start = _make(setup, source, held_out, training, processes, refetch=refetch)
        if processes.is_first:
            _write(setup.run_path, setup.draft, identity, start)
            _log(start, training)
        processes.wait()
        _load_those_of_first(setup, identity)
    return read_start(setup.run_path)


def read_start(run_path: Path) -> Start | None:
    """Return how a run began; None if that is not recorded."""
    found = _read(run_path)
    return None if found is None else found.start


def as_begun(training: TrainingConfig, run_path: Path) -> TrainingConfig:
    """Return the settings with the peak learning rate and the window of a run that names none.

    They are those of its checkpoint. Without one, the rate is the default for the first weights
    that the run really has. Earlier versions divided no sample.
    """
    folder, start = newest(run_path), read_start(run_path)
    own = {} if folder is None else checkpoint.read(folder).identity.get("training", {})
    changes: dict[str, float] = {}
    if training.learning_rate is None:
        is_drawn = folder is None and start is not None and bool(start.refused)
        rate = RATE_OF_DRAWN_WEIGHTS if is_drawn else training.peak_learning_rate
        changes["learning_rate"] = own.get("learning_rate", rate)
    if training.window_tokens is None and folder is not None:
        changes["window_tokens"] = own.get("window_tokens", WHOLE_SAMPLES)
    return training.model_copy(update=changes)


def load_first_weights(setup: DraftSetup) -> bool:
    """Load a run's first weights into its draft, if they are kept and whole; return whether."""
    path, record = setup.run_path / _FOLDER / _WEIGHTS_NAME, _read(setup.run_path)
    try:
        if record is None or file_digest(path) != record.weights_digest:
            return False
        tensors = load_file(path)
    except OSError:
        return False
    own = setup.draft.state_dict()
    tensors |= setup.draft.target_tensors()
    if {name: part.shape for name, part in tensors.items()} != {
        name: part.shape for name, part in own.items()
    }:
        return False
    setup.draft.load_tensors(tensors)
    return True


def _load_those_of_first(setup: DraftSetup, identity: str) -> None:
    """Load what the first process wrote; a network file system may show it later.

    Raises:
        DiskError: it does not appear.

    """
    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        found = _read(setup.run_path)
        if found is not None and found.identity == identity and load_first_weights(setup):
            return
        time.sleep(1.0)
    raise DiskError(
        f"the first weights in {setup.run_path / _FOLDER} are damaged, or written by another "
        f"machine and not seen on this one after {SHARED_SECONDS:.0f} s: check the file system"
    )


def _identity(setup: DraftSetup, source: SampleSource, training: TrainingConfig) -> str:
    content: dict[str, object] = {
        "source_id": source.source_id,
        "start": training.start or CLOSED_FORM,
        "training": {name: getattr(training, name) for name in _SOLVED_WITH},
        "drawn": _digest(setup.draft),
    }
    if setup.refit is not None:
        content["refit_from"] = setup.refit.layers
    elif (source.lengths > training.piece_tokens).any():
        content["windows"] = dataclasses.asdict(Windows.of(training, setup.draft.config))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(draft: DraftModel) -> str:
    """Return a digest of a draft before its first weights: sizes, vocabulary and all weights."""
    digest = xxhash.xxh3_128(draft.config.identity_json().encode())
    omitted = draft.target_tensors()
    for name, tensor in sorted(draft.state_dict().items()):
        if name not in omitted:
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def _make(
    setup: DraftSetup,
    source: SampleSource,
    held_out: SampleSource | None,
    training: TrainingConfig,
    processes: Processes,
    *,
    refetch: bool,
) -> Start:
    started = time.monotonic()
    draft, refit = setup.draft, setup.refit
    # The target reads whole samples, from their first token.
    windows = Windows.of(training, draft.config) if refit is None else WHOLE
    is_made = refit is not None or (training.is_solved and not why_not_solved(draft.config))
    batches = SampledBatches(
        source,
        training,
        windows,
        processes,
        num_tokens=tokens_needed(draft) if is_made else _SCALE_TOKENS,
        refetch=refetch,
    )
    misfit = 0.0
    if refit is not None:
        known = known_aux(refit.load_target(), refit.layers)
        misfit = refit_fusing_matrix(draft, batches, known, processes)
        del known  # and the target: what follows needs the memory
    elif training.refit and processes.is_first:
        logger.warning(
            "training.refit changes nothing: the draft in %s reads the target's aux layers",
            training.start,
        )
    sizes = measure_state_sizes(draft, batches, training, processes)
    if training.start_folder is not None:
        draft.set_aux_scale(sizes.aux_scale)
    else:
        draft.aux_scale.copy_(sizes.aux_scale)
    dtype = multiplying_dtype(training.dtype, draft.fc.weight.device)
    target_head = draft.draft_rows(setup.target_lm_head, dtype)
    measured = _measured(held_out, source, batches, training, windows, processes)
    step = measuring_step(draft, training, dtype)
    figures: HeldOutFigures | None = None
    refused = ""
    if training.is_solved:
        if is_made:
            logger.info("solving the draft's first weights on %s tokens", f"{batches.num_tokens:,}")
        solved = solve_start(
            draft, batches, measured, sizes, target_head, step, training, processes
        )
        figures, refused = solved.figures, solved.refused
    elif training.start_folder is not None:
        figures = measure(step, measured(), target_head)
    return Start(
        kind=training.start or CLOSED_FORM,
        refit_from=refit.layers if refit else (),
        misfit=misfit,
        num_tokens=batches.num_tokens,
        seconds=time.monotonic() - started,
        refused=refused,
        accuracies=figures.accuracies if figures else (),
        acceptance_length=figures.length if figures else 0.0,
        is_held_out=held_out is not None,
    )


def _measured(
    held_out: SampleSource | None,
    source: SampleSource,
    batches: SampledBatches,
    training: TrainingConfig,
    windows: Windows,
    processes: Processes,
) -> Callable[[], Iterable[PackedBatch]]:
    """Return what gives the batches to measure on: held out, or else the first of the sample."""
    most = training.held_out_tokens
    if held_out is not None:
        return partial(
            held_out_batches, held_out, windows, batch_tokens=_BATCH_TOKENS, max_tokens=most
        )
    most = min(most, _OWN_TOKENS)
    if processes.world_size > 1:  # the same on all, whatever their shares
        batches = SampledBatches(source, training, windows, ONE_PROCESS, num_tokens=most)
    return partial(batches.first, most)


def _read(run_path: Path) -> _Record | None:
    """Return the record of a run; None if there is none, or none that can be read."""
    try:
        return _Record.model_validate_json((run_path / _FOLDER / _RECORD_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def _write(run_path: Path, draft: DraftModel, identity: str, start: Start) -> None:
    omitted = draft.target_tensors()
    tensors: dict[str, Tensor] = {
        name: tensor.cpu().contiguous()
        for name, tensor in draft.state_dict().items()
        if name not in omitted
    }
    with atomic_folder(run_path / _FOLDER) as partial_folder:
        path = partial_folder / _WEIGHTS_NAME
        save_file(tensors, path)
        record = _Record(identity=identity, weights_digest=file_digest(path), start=start)
        (partial_folder / _RECORD_NAME).write_text(record.model_dump_json(indent=2), "utf-8")


def _log(start: Start, training: TrainingConfig) -> None:
    if start.refused:
        logger.warning(
            "training starts from random weights (training.start=%s would choose them), for solved "
            "ones were refused: %s",
            *(RANDOM, start.refused),
        )
    elif not start.is_drawn:
        what = f"the draft in {start.kind}" if training.start_folder else "solved weights"
        logger.info(
            "training starts from %s: %.2f tokens per verifying forward on %s samples, accuracy "
            "by TTT step %s (%.0f s)",
            what,
            start.acceptance_length,
            "held-out" if start.is_held_out else "its own",
            " ".join(f"{accuracy:.1%}" for accuracy in start.accuracies),
            start.seconds,
        )
        if training.peak_learning_rate > 2 * RATE_OF_GIVEN_WEIGHTS:
            logger.warning(
                "training.learning_rate is %g: it soon destroys %s; leave it out, or set "
                "training.start=%s",
                *(training.peak_learning_rate, what, RANDOM),
            )
