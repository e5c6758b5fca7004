"""How much memory one process needs to train a draft, before anything is loaded.

Weights, gradients and optimizer states are counted. What a step keeps per token was measured with
torch's allocator; a test measures it again. It is an upper bound: a step that takes only some
positions needs less, and fused norms on a GPU save a little.

Shapes: T tokens of a batch, L steps, H draft hidden, Ht target hidden, I feed-forward, N heads, K
key-value heads, E head size, D draft vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from eagle_core.draft.config import NUM_AUX_LAYERS, DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loss import CHUNK_ROWS
from eagle_core.training.optimizers import is_hidden_matrix

_FLOAT32 = 4
_ADAM_STATES = 2
_PREPARED_BATCHES = 2
"""On a GPU: the one in work, and the next."""
_LOGITS_IN_FLOAT32 = 4
"""Copies of a chunk's logits on a GPU; on a CPU they are tiles in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _KeptBytes:
    """What a step keeps for each token, in bytes per unit of a size."""

    hidden: float
    of_loss: float
    """Per unit of H, beside `hidden`, once for all layers: what the loss reads of the last one."""
    intermediate: float
    query: float
    key: float
    once_intermediate: float = 0.0
    """Of one step, while its feed-forward block is recomputed."""


_KEPT: Mapping[tuple[torch.dtype, bool], _KeptBytes] = {
    (torch.bfloat16, False): _KeptBytes(hidden=22, of_loss=16, intermediate=8, query=6, key=10),
    (torch.bfloat16, True): _KeptBytes(
        hidden=15, of_loss=12, intermediate=0, query=6, key=10, once_intermediate=12
    ),
    (torch.float32, False): _KeptBytes(hidden=30, of_loss=20, intermediate=18.8, query=12, key=21),
    (torch.float32, True): _KeptBytes(
        hidden=22, of_loss=15, intermediate=0, query=12, key=21, once_intermediate=24
    ),
}
"""By dtype of products and gradient checkpointing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Bytes of one process."""

    weights: int
    """The draft in float32, its frozen embedding, and the target's head rows."""
    gradients: int
    optimizer: int
    batch: int
    """A step's states of the target, activations and logits."""

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.weights + self.gradients + self.optimizer + self.batch


def training_memory(
    config: DraftConfig, training: TrainingConfig, dtype: torch.dtype, device: torch.device
) -> TrainingMemory:
    """Return what one process needs at most, without what CUDA itself takes.

    Args:
        config: sizes of the draft.
        training: batch, steps, optimizer, processes and how they share the draft.
        dtype: of matrix products, float32 or bfloat16.
        device: whose memory it is.

    """
    with torch.device("meta"):
        draft = DraftModel(config)
    num_trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    every = sum(parameter.numel() for parameter in draft.parameters())
    item = dtype.itemsize
    head_rows = config.draft_vocab_size * config.target_hidden_size * item
    rounded = num_trained * item if dtype != torch.float32 else 0
    return TrainingMemory(
        weights=every * _FLOAT32 + head_rows + rounded,
        gradients=num_trained * _FLOAT32,
        optimizer=_optimizer_bytes(draft, training),
        batch=_batch_bytes(config, training, dtype, device),
    )


def _optimizer_bytes(draft: nn.Module, training: TrainingConfig) -> int:
    """Return the bytes of AdamW's two moments, or Muon's one for the layers' matrices."""
    num_values = 0
    for name, parameter in draft.named_parameters():
        is_muon = training.optimizer == "muon" and is_hidden_matrix(name, parameter)
        num_values += parameter.requires_grad * parameter.numel() * (1 if is_muon else _ADAM_STATES)
    shards = training.world_size if training.sharding == "shard" else 1
    return num_values * _FLOAT32 // shards


def _batch_bytes(
    config: DraftConfig, training: TrainingConfig, dtype: torch.dtype, device: torch.device
) -> int:
    kept = _KEPT[dtype, training.gradient_checkpointing]
    each_layer = (
        kept.hidden * config.hidden_size
        + kept.intermediate * config.intermediate_size
        + kept.query * config.num_attention_heads * config.head_dim
        + kept.key * config.num_key_value_heads * config.head_dim
    )
    each_step = each_layer * config.num_hidden_layers + kept.of_loss * config.hidden_size
    per_token = each_step * training.ttt_length + kept.once_intermediate * config.intermediate_size
    is_gpu = device.type == "cuda"
    states = (NUM_AUX_LAYERS + 1) * config.target_hidden_size * torch.bfloat16.itemsize
    states *= _PREPARED_BATCHES if is_gpu else 1
    of_logit = 2 * dtype.itemsize + (_LOGITS_IN_FLOAT32 * _FLOAT32 if is_gpu else 0)
    logits = CHUNK_ROWS * config.draft_vocab_size * of_logit
    return int((per_token + states) * training.batch_tokens) + logits
