"""Interrupted equals uninterrupted, bit for bit, however it was interrupted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.tracking.tensorboard import TensorBoardTracker
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState
from eagle_core.training.result import Progress, TrainingResult
from eagle_core.training.trainer import train
from eagle_core.training.validation import HeldOutFigures
from tests.eagle_core.random_source import RandomSource, random_draft
from tests.paths import ROOT
from tests.waiting import LIMIT_SECONDS

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    dtype="float32",
    draft_vocab_size=30,
    ttt_length=3,
    max_steps=12,
    batch_tokens=60,
    warmup_steps=2,
    checkpoint_every=2,
    log_every=1,
    held_out_every=5,
    shuffle_window=2,
)


class InterruptedHereError(Exception):
    """Raised by a test in the middle of a run."""


def run(
    path: Path,
    config: TrainingConfig = CONFIG,
    *,
    source: RandomSource | None = None,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
    device: torch.device = CPU,
    variant: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], TrainingResult]:
    """Train a small draft below `path`, on `device`; return its weights and the result."""
    draft, head = random_draft(**variant)
    with TensorBoardTracker(path / "tensorboard") as tracker:
        result = train(
            config=config,
            draft=draft.to(device),
            target_lm_head=head,
            source=source or RandomSource(),
            held_out=RandomSource(num_samples=4, seed=1),
            run_path=path,
            tracker=tracker,
            on_progress=on_progress,
        )
    return draft.state_dict(), result


def interrupt_at(step: int) -> Callable[[Progress], None]:
    """Return a callback that breaks the run off once `step` is done."""

    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise InterruptedHereError

    return on_progress


def assert_equal_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Compare two state dicts exactly."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Compare two state dicts up to rounding."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=1e-5)


def moments(path: Path) -> dict[str, Tensor]:
    """Return the optimizer's tensors: unlike AdamW's steps they show how large gradients were."""
    folder = checkpoint.newest(path)
    assert folder is not None
    return checkpoint.load_optimizer(folder)


def test_loss_falls_and_the_run_stops_exactly_at_max_steps(tmp_path: Path) -> None:
    _, result = run(tmp_path)
    assert result.num_steps == 12
    assert not result.stopped
    assert result.figures.loss < result.figures.first_loss
    assert len(result.figures.held_out_accuracies) == 3
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("step", [1, 3, 4, 7, 11])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, step: int) -> None:
    expected, result = run(tmp_path / "whole")
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", on_progress=interrupt_at(step))
    found, resumed = run(tmp_path / "broken")
    assert_equal_bits(found, expected)
    assert resumed.figures == result.figures


@pytest.mark.slow
def test_sigkill_and_resume_equals_uninterrupted(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole")
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.eagle_core.training import test_trainer\n"
        "kill = lambda progress: progress.step == 7 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "test_trainer.run(Path(sys.argv[1]), on_progress=kill)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "killed")],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == -signal.SIGKILL
    found, _ = run(tmp_path / "killed")
    assert_equal_bits(found, expected)


def test_sigterm_writes_a_checkpoint_and_ends_cleanly(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole")

    def terminate(progress: Progress) -> None:
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    _, stopped = run(tmp_path / "stopped", on_progress=terminate)
    assert stopped.stopped
    assert stopped.num_steps == 5
    assert checkpoint.read(stopped.checkpoint_path).step == 5
    found, _ = run(tmp_path / "stopped")
    assert_equal_bits(found, expected)


def test_sigterm_before_the_first_step_is_answered_after_it(tmp_path: Path) -> None:
    class Terminating(RandomSource):
        def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
            super().prefetch(indices, others)
            os.kill(os.getpid(), signal.SIGTERM)

    _, stopped = run(tmp_path, source=Terminating())
    assert stopped.stopped
    assert stopped.num_steps == 1
    assert checkpoint.read(stopped.checkpoint_path).step == 1


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    expected, first = run(tmp_path)
    found, second = run(tmp_path, on_progress=interrupt_at(1))
    assert_equal_bits(found, expected)
    assert second.figures == first.figures


@pytest.mark.parametrize("name", ["draft.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_newest_checkpoint_falls_back_with_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, result = run(tmp_path)
    file = result.checkpoint_path / name
    file.write_bytes(file.read_bytes()[:-30])
    found, again = run(tmp_path)
    assert "falling back" in caplog.text
    assert name in caplog.text
    assert again.num_steps == 12
    assert_equal_bits(found, expected)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, CONFIG.model_copy(update={"keep_last": 3}))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010", "step-00000012"]


def test_other_settings_or_data_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(MismatchError, match=r"training\.learning_rate: saved 0\.0003, now 0\.5"):
        run(tmp_path, CONFIG.model_copy(update={"learning_rate": 0.5}))
    with pytest.raises(MismatchError, match="source_id: saved 'random', now 'other'"):
        run(tmp_path, source=RandomSource(source_id="other"))


def test_a_run_keeps_its_dtype_on_a_machine_with_another_favourite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"dtype": "auto", "max_steps": 2})
    for able, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        _, result = run(tmp_path / dtype, config)
        identity = checkpoint.read(result.checkpoint_path).identity
        assert identity["training"]["dtype"] == dtype
    with pytest.raises(MismatchError, match=r"training\.dtype: saved 'bfloat16', now 'float32'"):
        run(tmp_path / "bfloat16", config)
    _, again = run(tmp_path / "bfloat16", config.model_copy(update={"dtype": "bfloat16"}))
    assert again.num_steps == 2


def test_a_loss_that_is_not_finite_names_its_samples_and_keeps_the_checkpoint(
    tmp_path: Path,
) -> None:
    poisoned = RandomSource(poisoned=frozenset({3}))
    sample = poisoned.fetch(3).sample_id
    with pytest.raises(CorruptError, match=rf"{sample} \(memory, as {sample[:8]}\)"):
        run(tmp_path, source=poisoned)
    folder = checkpoint.newest(tmp_path)
    if folder is not None:
        weights = checkpoint.read(folder)
        assert weights.step % 2 == 0


def test_a_gradient_that_is_not_finite_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, head = random_draft()
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    draft.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
    monkeypatch.setitem(globals(), "random_draft", lambda: (draft, head))
    with pytest.raises(CorruptError, match=r"step 1: the gradient has norm (nan|inf).*no weight"):
        run(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """One step with far too high a rate: no later loss would tell."""
    config = CONFIG.model_copy(update={"max_steps": 2, "checkpoint_every": 1})
    run(tmp_path, config)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    ruined = load_file(saved / "draft.safetensors")
    ruined["fc.weight"][0, 0] = torch.nan
    with pytest.raises(CorruptError, match=r"not finite: fc\.weight; delete this checkpoint"):
        _load_with(saved, ruined)
    wild = CONFIG.model_copy(update={"max_steps": 1, "learning_rate": 1e38, "warmup_steps": 0})
    with pytest.raises(CorruptError, match=r"step 1: no checkpoint was written: .*--run"):
        run(tmp_path / "wild", wild)
    assert checkpoint.newest(tmp_path / "wild") is None


def _load_with(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "draft.safetensors")
    draft, _ = random_draft()
    checkpoint.load_weights(draft, folder)


def test_a_run_without_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    draft, _ = random_draft()
    with pytest.raises(ConfigError, match="no checkpoint yet; run the train flow"):
        checkpoint.load_draft(draft, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "muon", "learning_rate": 0.01},
        {"batches_per_step": 3},
        {"dtype": "bfloat16"},
    ],
    ids=["muon", "accumulation", "bfloat16"],
)
def test_every_kind_of_run_resumes_exactly(tmp_path: Path, change: dict[str, object]) -> None:
    config = CONFIG.model_copy(update={**change, "max_steps": 7})
    expected, result = run(tmp_path / "whole", config)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", config, on_progress=interrupt_at(5))
    found, _ = run(tmp_path / "broken", config)
    assert_equal_bits(found, expected)
    assert result.figures.loss < result.figures.first_loss


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        (
            {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True, "sliding_window": 3},
            {"gradient_checkpointing": True},
        ),
        ({"num_hidden_layers": 3, "qk_norm": True, "norm_before_fc": True}, {"optimizer": "muon"}),
        ({"norm_before_residual": True, "rope_scaling": YARN}, {"dtype": "bfloat16"}),
        ({"target_head": True, "draft_vocab_size": 50}, {"optimizer": "muon"}),
        ({"hidden_size": 12, "num_hidden_layers": 2}, {}),
        ({"hidden_size": 20, "qk_norm": True, "attention_bias": True}, {"dtype": "bfloat16"}),
    ],
    ids="-".join,
)
def test_every_variant_resumes_exactly(
    tmp_path: Path, variant: dict[str, Any], change: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update={**change, "max_steps": 7})
    expected, result = run(tmp_path / "whole", config, variant=variant)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", config, on_progress=interrupt_at(5), variant=variant)
    found, _ = run(tmp_path / "broken", config, variant=variant)
    assert_equal_bits(found, expected)
    assert result.figures.loss < result.figures.first_loss
    drawn, _ = random_draft(**variant)
    kept = load_file(result.checkpoint_path / "draft.safetensors")
    assert ("embed_tokens.weight" in kept) == drawn.config.has_own_embedding
    assert ("lm_head.weight" in kept) != drawn.config.target_head
    frozen = {name for name, p in drawn.named_parameters() if not p.requires_grad}
    for name, parameter in drawn.named_parameters():
        assert torch.equal(parameter, expected[name]) == (name in frozen), name
    trained = {name.split("/")[0] for name in moments(tmp_path / "whole")}
    assert trained == {name for name, _ in drawn.named_parameters()} - frozen


def test_an_embedding_of_the_drafts_own_comes_from_the_checkpoint(tmp_path: Path) -> None:
    """Another machine may find other principal directions: the trained ones must stay."""
    expected, result = run(tmp_path, variant={"hidden_size": 12})
    elsewhere, _ = random_draft(seed=5, hidden_size=12)
    checkpoint.load_weights(elsewhere, result.checkpoint_path)
    assert_equal_bits(elsewhere.state_dict(), expected)


def test_a_checkpoint_of_another_variant_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, variant={"sliding_window": 3})
    with pytest.raises(MismatchError, match=r"draft\.sliding_window: saved 3, now None"):
        run(tmp_path)


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    changes = {"max_steps": 1, "batch_tokens": 10**6, "max_grad_norm": 1e9}
    whole = CONFIG.model_copy(update=changes)
    source = RandomSource(num_samples=8)
    one, _ = run(tmp_path / "one", whole, source=source)
    parts = whole.model_copy(update={"batch_tokens": 40, "batches_per_step": 100})
    many, _ = run(tmp_path / "many", parts, source=source)
    assert_close(many, one)
    assert_close(moments(tmp_path / "many"), moments(tmp_path / "one"))


@pytest.mark.parametrize(("lengths", "expected"), [((1.2, 1.5, 1.1), 2), ((1.5, 1.1, 1.5), 3)])
def test_the_best_checkpoint_is_kept(
    tmp_path: Path, lengths: tuple[float, ...], expected: int
) -> None:
    """Of equals the newest; one whose figures were measured at another step does not count."""
    state = LoaderState(source_id="here", seed=0)
    tensors = {"x": torch.ones(1)}
    for step, length in enumerate((*lengths, 9.0), start=1):
        figures = {"held_out_length": length, "held_out_step": min(step, 3)}
        record = checkpoint.Checkpoint(step=step, loader=state, identity={}, figures=figures)
        checkpoint.save(tmp_path, record, tensors, tensors, keep_last=1)
    best = checkpoint.best(tmp_path)
    assert best is not None
    assert best.name == f"step-{expected:08d}"
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {best.name, "step-00000004"}


def test_a_damaged_newer_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    """The run fell back behind it and went on: what it writes now has the lower number."""
    state = LoaderState(source_id="here", seed=0)
    tensors = {"x": torch.ones(1)}
    for step in (200, 400, 250):
        record = checkpoint.Checkpoint(step=step, loader=state, identity={}, figures={})
        folder = checkpoint.save(tmp_path, record, tensors, tensors, keep_last=1 + (step == 400))
        if step == 400:
            (folder / "draft.safetensors").write_bytes(b"")
    assert checkpoint.newest(tmp_path) == folder
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000250"]


def test_a_checkpoint_says_what_was_measured_at_its_step(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"held_out_every": 2, "checkpoint_every": 4, "max_steps": 4})
    run(tmp_path, config)
    best = checkpoint.best(tmp_path)
    assert best is not None
    figures = checkpoint.read(best).figures
    assert figures["held_out_step"] == 4
    assert figures["held_out_length"] == 1 + sum(figures["held_out_joint_prefix_accuracies"])


def test_the_best_measurement_has_a_checkpoint_wherever_it_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only where the intervals of measurements and of checkpoints coincide."""
    found = iter((0.1, 0.3, 0.2, 0.5, 0.4, 0.1, 0.45, 0.2))

    def measured(*_: object, **__: object) -> HeldOutFigures:
        share = next(found)
        return HeldOutFigures(
            accuracies=(share,), acceptances=(share,), joint_prefix_accuracies=(share,)
        )

    monkeypatch.setattr("eagle_core.training.trainer.measure", measured)
    every = {"held_out_every": 1, "checkpoint_every": 100, "max_steps": 6, "keep_last": 1}
    run(tmp_path, CONFIG.model_copy(update=every))
    run(
        tmp_path, CONFIG.model_copy(update={**every, "max_steps": 8, "extend": "keep"})
    )  # goes on: 0.5 is known
    best = checkpoint.best(tmp_path)
    assert best is not None
    assert best.name == "step-00000004"
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {best.name, "step-00000008"}


HALF_SILENT = RandomSource(silent=frozenset(range(0, 20, 2)))
"""Sample 0 stands in where a rank has no batch left; ranks must agree though it has no gradient."""
_RANKS = """
import json, sys
from pathlib import Path
from eagle_core.training.distributed import join_processes
from tests.eagle_core.training import test_trainer
with join_processes():
    for folder, config, variant in json.loads(sys.argv[1]):
        config = test_trainer.CONFIG.model_validate(config)
        test_trainer.run(Path(folder), config, source=test_trainer.HALF_SILENT, variant=variant)
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads  # may abort Python's end
"""


RANKS_CONFIG = CONFIG.model_copy(
    update={
        "max_steps": 8,
        "checkpoint_every": 4,
        "schedule": "constant",
        "max_grad_norm": 1e9,
    }
)
RANKS_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "biases-norms": {
        "num_hidden_layers": 2,
        "attention_bias": True,
        "qk_norm": True,
        "norm_before_fc": True,
    },
    "window-target_head": {
        "num_hidden_layers": 2,
        "mlp_bias": True,
        "sliding_window": 3,
        "target_head": True,
        "draft_vocab_size": 50,
    },
    "narrower": {"hidden_size": 12, "norm_before_residual": True},
}


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders VARIANT/SHARDING of runs of two ranks, all by one launch; each is resumed once."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        (
            str(folder / name / sharding),
            RANKS_CONFIG.model_copy(update=changes).model_dump(mode="json"),
            variant,
        )
        for name, variant in RANKS_VARIANTS.items()
        for sharding in ("replicate", "shard")
        for changes in ({"sharding": sharding, "max_steps": steps} for steps in (4, 8))
    ]  # each second run goes on from the checkpoint of the first
    script = folder / "ranks.py"
    script.write_text(_RANKS)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), json.dumps(runs)),
        ],
        check=True,
        timeout=LIMIT_SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS_VARIANTS)
def test_two_ranks_make_the_steps_of_one(of_two_ranks: Path, tmp_path: Path, name: str) -> None:
    """The same global batches, an epoch that ends in the middle of a step, and a resumed run."""
    variant = RANKS_VARIANTS[name]
    in_turns = RANKS_CONFIG.model_copy(update={"batches_per_step": 2})
    one, result = run(tmp_path, in_turns, source=HALF_SILENT, variant=variant)
    for sharding in ("replicate", "shard"):
        draft, _ = random_draft(**variant)
        path = of_two_ranks / name / sharding
        folder = checkpoint.newest(path)
        assert folder is not None
        checkpoint.load_weights(draft, folder)
        assert_close(draft.state_dict(), one)
        assert_close(moments(path), moments(tmp_path))
        found = checkpoint.read(folder)
        assert found.step == 8
        assert found.figures["loss"] == pytest.approx(result.figures.loss, rel=1e-4)
