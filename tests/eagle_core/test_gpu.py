"""What only a CUDA device can show; run with `make test-gpu`, skipped where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import golden
from benchmarks.eyas_step import new_draft, options, packed_batch
from benchmarks.step_case import SHAPES, StepCase, draft_rows_of_target_head
from eagle_core.draft.model import DraftModel
from eagle_core.target.capture import CapturingTarget, capture_states
from eagle_core.target.layerwise.streamed import StreamedTarget
from eagle_core.target.model import TargetModel
from eagle_core.training import checkpoint
from eagle_core.training.config import TttConfig
from eagle_core.training.device_copies import device_copies
from eagle_core.training.packing import pack
from eagle_core.training.precision import multiplying_dtype
from eagle_core.training.ttt import ttt_step
from tests.eagle_core.random_source import RandomSource
from tests.eagle_core.target.layerwise.test_streamed import samples, write
from tests.eagle_core.training.test_trainer import CONFIG, InterruptedHereError, interrupt_at, run
from tests.paths import GOLDEN, ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),  # torch's own
]
CUDA = torch.device("cuda")
CASE = StepCase(
    shape=SHAPES["tiny"],
    ttt_length=7,
    dtype="float32",
    lengths=(300, 2, 180, 70),
    loss_mask=tuple(place % 40 > 12 for place in range(552)),
)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_vectors(path: Path) -> None:
    deviations = golden.compare(path, device=CUDA)
    assert deviations.loss <= golden.LOSS_TOLERANCE
    assert deviations.gradient <= golden.GRADIENT_TOLERANCE
    assert deviations.acceptance <= golden.LOSS_TOLERANCE


def _gradients(
    draft: DraftModel, device: torch.device, settings: TttConfig, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    draft = draft.to(device)
    draft.zero_grad(set_to_none=True)
    head = draft_rows_of_target_head(CASE.shape).to(device, dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        outcome = ttt_step(draft, packed_batch(CASE).to(device), head, settings)
    outcome.loss.backward()
    return outcome.loss.item(), {
        name: parameter.grad.cpu()
        for name, parameter in draft.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"]
)
def test_the_step_is_that_of_the_cpu(
    *, compiled: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Compiled, FlexAttention's kernels and their gradients, that of log-sum-exp among them."""
    draft = new_draft(CASE.shape)
    loss, expected = _gradients(draft, torch.device("cpu"), options(CASE), torch.float32)
    settings = TttConfig(ttt_length=CASE.ttt_length, compile=compiled)
    found_loss, found = _gradients(draft, CUDA, settings, dtype)
    assert found_loss == pytest.approx(loss, rel=tolerance)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        deviation = (gradient - expected[name]).norm() / expected[name].norm()
        assert deviation < tolerance, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumes(tmp_path: Path, optimizer: str) -> None:
    """Sums of atomic additions are not bit-exact there; the figures are close."""
    assert multiplying_dtype("auto", CUDA) == torch.bfloat16
    config = CONFIG.model_copy(update={"optimizer": optimizer, "dtype": "auto"})
    _, expected = run(tmp_path / "whole", config, device=CUDA)
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", config, on_progress=interrupt_at(5), device=CUDA)
    _, found = run(tmp_path / "broken", config, device=CUDA)
    assert found.figures.loss < found.figures.first_loss
    assert found.figures.loss == pytest.approx(expected.figures.loss, rel=2e-2)


def _bits(target: CapturingTarget) -> list[bytes]:
    states = capture_states(target, samples((5, 41, 19, 60)))
    return [one.last_hidden_state.tobytes() + one.aux_hidden_states.tobytes() for one in states]


@pytest.mark.parametrize("in_main", [False, True], ids=["states wait there", "in main memory"])
def test_layer_by_layer_the_states_are_those_of_the_whole_target(
    tmp_path: Path, in_main: bool
) -> None:
    config = write("llama", tmp_path).model_copy(update={"device": "cuda", "dtype": "bfloat16"})
    target = StreamedTarget.load(config, group_tokens=100, states_wait_in_main=in_main)
    assert _bits(target) == _bits(TargetModel.load(config))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_spread_over_two_gpus_the_states_are_those_of_one(tmp_path: Path) -> None:
    config = write("llama", tmp_path).model_copy(update={"device": "cuda", "dtype": "bfloat16"})
    target = TargetModel.load(config, is_spread=True)
    assert _bits(target) == _bits(TargetModel.load(config))


_RANKS = """
import os
import sys
from pathlib import Path
import torch
from eagle_core.training.distributed import join_processes
from tests.eagle_core import test_gpu
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
with join_processes():
    config = test_gpu.CONFIG.model_validate_json(sys.argv[2])
    test_gpu.run(Path(sys.argv[1]), config, device=test_gpu.CUDA)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_gpus_make_the_steps_of_one(tmp_path: Path, sharding: str) -> None:
    config = CONFIG.model_copy(update={"schedule": "constant", "max_grad_norm": 1e9})
    whole = config.model_copy(update={"batches_per_step": 2})
    _, expected = run(tmp_path / "one", whole, device=CUDA)
    script = tmp_path / "ranks.py"
    script.write_text(_RANKS)
    ranks = config.model_copy(update={"sharding": sharding}).model_dump_json()
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), str(tmp_path / "two"), ranks),
        ],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    folder = checkpoint.newest(tmp_path / "two")
    assert folder is not None
    assert checkpoint.read(folder).figures["loss"] == pytest.approx(expected.figures.loss, rel=1e-3)


def test_batches_are_copied_from_pinned_memory_on_a_stream_of_their_own() -> None:
    source, device = RandomSource(), torch.device("cuda")
    samples_of_batch = [source.fetch(index) for index in range(4)]
    expected, pinned = pack(samples_of_batch), pack(samples_of_batch, pin_memory=True)
    assert all(tensor.is_pinned() for tensor in pinned.tensors().values())
    copies = device_copies(device)
    assert copies is not None
    (found,) = copies.begin((pinned,))()
    for name, tensor in found.tensors().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), expected.tensors()[name])
