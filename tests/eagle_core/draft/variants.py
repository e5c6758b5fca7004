"""Drafts of every variant, in which no weight is trivial."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.target.end_weights import load_ends

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OWN_YARN = {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "truncate": False}
FULL: Mapping[str, Any] = {"target_head": True, "draft_vocab_size": None}
"""The draft vocabulary is the target's."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "layers": {"num_hidden_layers": 3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm-biases": {"qk_norm": True, "attention_bias": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_before_residual": {"norm_before_residual": True},
    "fc_norm": {"fc_norm": True, "norm_output": True},
    "both-norms": {"fc_norm": True, "norm_before_fc": True},
    "target_head": FULL,
    "wider": {"hidden_size": 160},
    "narrower": {"hidden_size": 32, "intermediate_size": 80},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "window": {"sliding_window": 8},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "own-yarn": {"rope_scaling": OWN_YARN},
    "many-llama": {
        "num_hidden_layers": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_output": True,
        "hidden_size": 160,
        "norm_before_residual": True,
        "sliding_window": 12,
        "rope_scaling": LLAMA3,
    },
    "many-qwen3": {
        "num_hidden_layers": 2,
        "qk_norm": True,
        "norm_before_fc": True,
        "sliding_window": 8,
        "rope_scaling": YARN,
        "norm_before_residual": True,
        **FULL,
    },
}


def make_variant(
    target_path: Path,
    changes: Mapping[str, Any],
    *,
    draft_vocab_size: int = 200,
    seed: int = 0,
    tokens: Sequence[int] | None = None,
) -> DraftModel:
    """Return a draft of a target with other fields of its configuration.

    The draft vocabulary is `tokens`, by default a random part of the target's.
    """
    target = AutoConfig.from_pretrained(target_path)
    size = changes.get("draft_vocab_size", draft_vocab_size) or target.vocab_size
    plain = DraftConfig.from_target(target, draft_vocab_size=size)
    config = DraftConfig(**{**plain.model_dump(), **changes, "draft_vocab_size": size})
    embedding, head = load_ends(target_path, dtype=torch.float32)
    counts = torch.randperm(len(head), generator=torch.Generator().manual_seed(seed)).numpy()
    if tokens is not None:
        counts[list(tokens)] = 2 * len(head)
    vocabulary = DraftVocabulary.build(counts, size=size)
    draft = DraftModel(config)
    draft.initialise(embedding=embedding, lm_head=head, vocabulary=vocabulary, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            elif parameter.requires_grad:
                parameter.mul_(5)
        exponents = torch.randint(-3, 8, draft.aux_scale.shape, generator=generator)
        draft.aux_scale.copy_(torch.exp2(exponents))
    return draft
