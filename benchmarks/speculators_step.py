"""The EAGLE-3 model of the speculators package as a peer of `benchmarks.train_step`.

Run by the interpreter of an environment that has speculators 0.9.0; `docs/training-step.md`
describes how to create one. The model is called as the package's trainer calls it: its own
`get_trainer_kwargs` and AdamW, samples shifted by its own `shift_batch` and concatenated in one row
with document and position ids, as its `CollateFn` does, but without padding at the end.
Differences:

* eager losses, as the fused ones need Triton; no `torch.compile`, which the package uses on a GPU;
* the loss mask is shifted left by one token more than in the package, so that the same positions
  count as in ours, and the loss decays by the same 0.8 per step;
* variants: "sdpa" or "eager" attention; "+head" trains the draft's head as the other peers do. The
  package freezes it (`requires_grad = False` wherever the model is built), which saves a product.

Imports nothing of Eyas. Its loss is a divergence, so only gradients can be compared.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from speculators.models.eagle3 import Eagle3DraftModel  # type: ignore[import-not-found]
from speculators.train.optimizers import build_optimizers  # type: ignore[import-not-found]
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.speculators_model import build_model, one_row
from benchmarks.step_case import (
    RMS_NORM_EPS,
    ROPE_THETA,
    STEP_DECAY,
    Shape,
    StepCase,
    StepTensors,
    draft_ids,
    draft_rows_of_target_head,
    fill,
    step_tensors,
)
from benchmarks.step_worker import LEARNING_RATE, Peer, serve


def new_model(shape: Shape, attention: str) -> Eagle3DraftModel:
    """Return the model with the same weights as every peer."""
    layer = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        rms_norm_eps=RMS_NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        pad_token_id=None,
    )
    model = build_model(layer, shape.draft_vocab_size, attention)
    ids = draft_ids(shape)
    t2d = torch.zeros(shape.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    model.load_vocab_mappings(t2d, ids - torch.arange(len(ids)))
    for name, parameter in model.named_parameters():
        fill(name.replace("layers.0.", "midlayer."), parameter)
    with torch.no_grad():
        model.verifier_lm_head.weight.copy_(draft_rows_of_target_head(shape))
    return model


def row_of(case: StepCase, tensors: StepTensors) -> Mapping[str, Tensor]:
    """Return the model's arguments: one row of all sequences, each shorter by one token."""
    return one_row(
        case.starts,
        ids=tensors.input_ids,
        aux=tensors.aux_hidden_states,
        last=tensors.last_hidden_state,
        loss_mask=tensors.loss_mask,
    )


def load(case: StepCase, variant: str) -> Peer:
    """Return the package's step as a peer."""
    attention, _, head = variant.partition("+")
    model = new_model(case.shape, attention).to(case.device)
    model.lm_head.weight.requires_grad_(bool(head))
    model.train()

    def prepare(wanted: StepCase) -> Callable[[], Tensor]:
        row = row_of(wanted, step_tensors(wanted, model.verifier_lm_head.weight.detach().cpu()))
        arguments = {name: tensor.to(wanted.device) for name, tensor in row.items()}
        settings, _ = model.get_trainer_kwargs(
            loss_fn="kl_div",
            loss_implementation="eager",
            ttt_steps=wanted.ttt_length,
            ttt_step_loss_decay=STEP_DECAY,
        )
        return lambda: _loss(model, arguments, settings)

    settings = SimpleNamespace(optimizer="adamw", lr=LEARNING_RATE, weight_decay=0.0)
    return Peer(
        trained=[parameter for parameter in model.parameters() if parameter.requires_grad],
        optimizer=build_optimizers(model, settings)[0],
        fusion=model.fc.weight,
        prepare=prepare,
    )


def _loss(
    model: Eagle3DraftModel, arguments: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Tensor:
    _draft_tokens, loss, _metrics = model(**arguments, **settings)
    result: Tensor = loss
    return result


if __name__ == "__main__":
    serve(load)
