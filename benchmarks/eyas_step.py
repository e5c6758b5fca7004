"""`eagle_core.training.ttt` as the trainer calls it, as a peer of `benchmarks.train_step`."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.step_case import (
    RMS_NORM_EPS,
    ROPE_THETA,
    STEP_DECAY,
    Shape,
    StepCase,
    draft_ids,
    draft_rows_of_target_head,
    fill,
    step_tensors,
)
from benchmarks.step_worker import Peer, serve
from eagle_core.bfloat16 import DTYPES
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TttConfig
from eagle_core.training.packing import PackedBatch
from eagle_core.training.position_draws import PositionDraws
from eagle_core.training.ttt import ttt_step

_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Settings of our step: `compile`, `window=W` and `positions=N`, separated by commas."""

    compiled: bool = False
    window: int | None = None
    """`draft.sliding_window`"""
    positions: int | None = None
    """`training.max_positions_per_sample`"""

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Return the settings that `text` names."""
        named = dict(part.partition("=")[::2] for part in text.split(",") if part)
        numbers = {name: int(named[name]) for name in ("window", "positions") if name in named}
        return cls(compiled="compile" in named, **numbers)


PLAIN = Variant()


def new_draft(shape: Shape, *, window: int | None = None) -> DraftModel:
    """Return a draft with the same weights as every peer."""
    config = DraftConfig(
        hidden_size=shape.hidden_size,
        target_hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        draft_vocab_size=shape.draft_vocab_size,
        rms_norm_eps=RMS_NORM_EPS,
        rope_theta=ROPE_THETA,
        sliding_window=window,
    )
    with torch.device("meta"):
        draft = DraftModel(config)
    draft = draft.to_empty(device="cpu")
    for name, parameter in draft.named_parameters():
        fill(name, parameter)
    ids = draft_ids(shape)
    draft.aux_scale.fill_(1)
    draft.t2d.fill_(value=False)
    draft.t2d[ids] = True
    draft.d2t.copy_(ids - torch.arange(len(ids)))
    return draft


def packed_batch(case: StepCase, draws: PositionDraws | None = None) -> PackedBatch:
    """Return the batch; the logsumexp, which no gradient needs, is over the draft vocabulary.

    With `draws`, some positions of each sequence are taken.
    """
    head = draft_rows_of_target_head(case.shape)
    tensors = step_tensors(case, head)
    parts = torch.split(tensors.last_hidden_state, _ROWS)
    return PackedBatch(
        sample_ids=tuple(str(number) for number in range(len(case.lengths))),
        starts=case.starts,
        input_ids=tensors.input_ids,
        loss_mask=tensors.loss_mask,
        aux_hidden_states=tensors.aux_hidden_states,
        last_hidden_state=tensors.last_hidden_state,
        target_argmax=draft_ids(case.shape)[tensors.draft_choice],
        target_logsumexp=torch.cat([(part @ head.T).logsumexp(dim=-1) for part in parts]),
        position_weights=None if draws is None else _weights(case, draws),
    )


def _weights(case: StepCase, draws: PositionDraws) -> Tensor:
    mask, weights = np.array(case.loss_mask), []
    for number, (start, end) in enumerate(pairwise(case.starts)):
        weights.append(draws.weights(str(number), mask[start:end], seed=0, epoch=0))
    return torch.from_numpy(np.concatenate(weights))


def options(case: StepCase, variant: Variant = PLAIN) -> TttConfig:
    """Return the trainer's defaults with the case's length."""
    return TttConfig(
        ttt_length=case.ttt_length,
        step_decay=STEP_DECAY,
        compile=variant.compiled,
        max_positions_per_sample=variant.positions,
    )


def load(case: StepCase, variant: str) -> Peer:
    """Return our step as a peer, with the settings of a `Variant`."""
    device, settings = torch.device(case.device), Variant.parse(variant)
    draft = new_draft(case.shape, window=settings.window).to(device)
    head = draft_rows_of_target_head(case.shape).to(device, DTYPES[case.dtype])

    def prepare(wanted: StepCase) -> Callable[[], Tensor]:
        chosen = options(wanted, settings)
        batch = packed_batch(wanted, PositionDraws.of(chosen)).to(device)
        return lambda: ttt_step(draft, batch, head, chosen).loss

    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    return Peer(
        trained=trained,
        optimizer=torch.optim.AdamW(trained, fused=True),  # as the trainer's
        fusion=draft.get_parameter("fc.weight"),
        prepare=prepare,
    )


if __name__ == "__main__":
    serve(load)
