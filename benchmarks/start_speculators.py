"""Train with `benchmarks.start_peer` on the batches of a run, and read its draft at some steps."""

import json
import subprocess
import tempfile
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save_file

from eagle_core.draft.importing import read_draft, warm_start
from eagle_core.samples import SampleSource
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState, steps
from eagle_core.training.packing import PackedBatch
from eagle_core.training.pieces import WHOLE
from eagle_core.training.schedule import step_shape
from flows.bridge.draft_setup import DraftSetup

ROOT = Path(__file__).parents[1]


def train_speculators(
    python: Path,
    setup: DraftSetup,
    training: TrainingConfig,
    source: SampleSource,
    *,
    num_steps: int,
    marks: Collection[int],
    on_mark: Callable[[int], None],
) -> None:
    """Train for `num_steps`; `setup.draft` has the weights of that step at each mark."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_case(folder, setup, training, num_steps)
        stream = steps(
            source,
            LoaderState(source_id=source.source_id, seed=training.seed),
            step_shape(training, WHOLE),  # as the peer, which knows no pieces
        )
        with (
            closing(stream),  # type: ignore[type-var]  # a generator
            subprocess.Popen(
                [python, "-m", "benchmarks.start_peer", folder],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as peer,
        ):
            for step in range(num_steps + 1):
                if step > 0:
                    (batch,) = next(stream).batches
                    _ask(peer, {"batch": str(_written(batch, folder / "batch.safetensors"))})
                if step in marks:
                    saved = folder / "draft"
                    _ask(peer, {"save": str(saved)})
                    warm_start(setup.draft, read_draft(saved))
                    on_mark(step)


def _write_case(folder: Path, setup: DraftSetup, training: TrainingConfig, num_steps: int) -> None:
    draft = setup.draft
    sizes = {
        **draft.config.model_dump(mode="json"),
        "ttt_length": training.ttt_length,
        "seed": training.seed,
        "steps": num_steps,
        "threads": torch.get_num_threads(),
    }
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    tensors = {
        "embedding": draft.embed_tokens.weight.detach(),
        "head": draft.draft_rows(setup.target_lm_head, torch.float32),
        "t2d": draft.t2d,
        "d2t": draft.d2t,
    }
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / "target.safetensors",
    )


def _written(batch: PackedBatch, path: Path) -> Path:
    tensors = {
        "starts": torch.tensor(batch.starts),
        "input_ids": batch.input_ids,
        "loss_mask": batch.loss_mask,
        "aux_hidden_states": batch.aux_hidden_states.float(),
        "last_hidden_state": batch.last_hidden_state.float(),
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def _ask(peer: "subprocess.Popen[str]", request: dict[str, str]) -> None:
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(json.dumps(request) + "\n")
    peer.stdin.flush()
    answer = peer.stdout.readline()
    assert answer, f"the peer ended with {peer.wait()}"
