"""The optimizers of a draft: AdamW, or Muon for the layer's matrices and AdamW for the rest.

Muon (torch.optim.Muon) orthogonalises the updates of matrices between hidden states; embeddings,
heads and norms are not such matrices and use AdamW.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TrainingConfig
from eagle_core.training.distributed import placed_like, whole


def make_optimizers(draft: DraftModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers; each trained parameter is in exactly one of them."""
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    if config.optimizer == "adamw":
        return [_adamw(list(trained.values()), config)]
    hidden = [p for name, p in trained.items() if is_hidden_matrix(name, p)]
    others = [p for name, p in trained.items() if not is_hidden_matrix(name, p)]
    muon = torch.optim.Muon(
        hidden,
        lr=config.peak_learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that AdamW's learning rates suit both
    )
    return [muon, _adamw(others, config)]


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether Muon, if chosen, is the optimizer of a draft's trained parameter."""
    return parameter.ndim == 2 and not name.startswith("lm_head")


def _adamw(parameters: Sequence[Tensor], config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=config.peak_learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Set the rate of the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def state_tensors(
    optimizers: Sequence[torch.optim.Optimizer], draft: DraftModel
) -> dict[str, Tensor]:
    """Return all state as unsharded tensors named PARAMETER/KEY; every process must call this."""
    return {
        f"{name}/{key}": whole(value).contiguous()
        for name, _, state in _states(optimizers, draft)
        for key, value in state.items()
    }


def restore_state(
    optimizers: Sequence[torch.optim.Optimizer], draft: DraftModel, tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state that `state_tensors` returned."""
    for name, parameter, state in _states(optimizers, draft):
        prefix = f"{name}/"
        state.update(
            {
                full.removeprefix(prefix): placed_like(tensor, parameter)
                for full, tensor in tensors.items()
                if full.startswith(prefix)
            }
        )


def _states(
    optimizers: Sequence[torch.optim.Optimizer], draft: DraftModel
) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """Yield (name, parameter, its state) of every trained parameter."""
    for name, parameter in draft.named_parameters():
        for optimizer in optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                yield name, parameter, optimizer.state[parameter]
