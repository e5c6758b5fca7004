"""Compare the training step with golden vectors: `python -m benchmarks.golden FILE...`.

Prints the largest deviations and exits non-zero beyond LOSS_TOLERANCE (absolute) or
GRADIENT_TOLERANCE (relative, by norm), in float32. The file format is in `tests/golden/README.md`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.packing import PackedBatch
from eagle_core.training.ttt import ttt_step

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviations:
    """The largest difference of each kind; losses and rates absolute, gradients relative."""

    loss: float
    accuracy: float
    acceptance: float
    gradient: float
    worst_gradient: str

    @property
    def passes(self) -> bool:
        """Whether all of them are within tolerance."""
        values = (self.loss, self.accuracy, self.acceptance)
        return max(values) <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def compare(path: Path, device: torch.device = CPU) -> Deviations:
    """Run the training step on one file of golden vectors, on `device`."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (no dict)
    options = TttConfig(
        ttt_length=config.pop("ttt_length"),
        step_decay=config.pop("step_decay"),
        loss_positions="eagle3",
        loss_reduction="positions",
    )
    draft = DraftModel(DraftConfig(target_hidden_size=config["hidden_size"], **config)).to(device)
    draft.load_tensors(_part(tensors, "weight."))
    batch = _batch(tensors)
    head = tensors["input.target_lm_head"][draft.t2d]
    outcome = ttt_step(draft, batch, head, options)
    outcome.loss.backward()  # type: ignore[no-untyped-call]  # torch
    with torch.no_grad():  # acceptance is computed without gradients only
        measured = ttt_step(draft, batch, head, options)
    gradients = {
        name: _relative(parameter.grad, tensors[f"grad.{name}"])
        for name, parameter in draft.named_parameters()
        if parameter.grad is not None
    }
    if missing := _part(tensors, "grad.").keys() - gradients.keys():
        raise KeyError(f"{path}: no gradient reached {sorted(missing)}")
    expected = _part(tensors, "expected.")
    worst = max(gradients, key=lambda name: gradients[name])
    return Deviations(
        loss=max(
            _absolute(outcome.loss, expected["loss"]),
            _absolute(outcome.step_losses, expected["step_losses"]),
        ),
        accuracy=_absolute(
            outcome.step_correct / outcome.step_supervised.clamp(min=1), expected["step_accuracy"]
        ),
        acceptance=_absolute(
            measured.step_acceptance / measured.step_counted.clamp(min=1),
            expected["step_acceptance_rate"],
        ),
        gradient=gradients[worst],
        worst_gradient=worst,
    )


def _batch(tensors: dict[str, Tensor]) -> PackedBatch:
    last = tensors["input.last_hidden_state"]
    logits = last @ tensors["input.target_lm_head"].T
    return PackedBatch(
        sample_ids=("golden",),
        starts=(0, len(last)),
        input_ids=tensors["input.input_ids"].long(),
        loss_mask=tensors["input.loss_mask"].bool(),
        aux_hidden_states=tensors["input.aux_hidden_states"],
        last_hidden_state=last,
        target_argmax=logits.argmax(dim=-1),
        target_logsumexp=logits.logsumexp(dim=-1),
    )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _absolute(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected).abs().max())


def _relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of `expected`, unless this is zero."""
    difference, norm = float((found - expected).norm()), float(expected.norm())
    return difference / norm if norm else difference


def main(arguments: list[str]) -> int:
    """Compare every given file; return the exit status."""
    if not arguments:
        sys.stderr.write("usage: python -m benchmarks.golden FILE...\n")
        return 2
    passed = True
    for name in arguments:
        found = compare(Path(name))
        passed = passed and found.passes
        sys.stdout.write(
            f"{'ok  ' if found.passes else 'FAIL'} {Path(name).name}: loss {found.loss:.1e}, "
            f"accuracy {found.accuracy:.1e}, acceptance {found.acceptance:.1e}, "
            f"gradient {found.gradient:.1e} ({found.worst_gradient})\n"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
