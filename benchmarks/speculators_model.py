"""The EAGLE-3 model of the speculators package, and its inputs, for two benchmarks.

Imported by the interpreter of an environment that has speculators 0.9.0; imports nothing of Eyas.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from speculators import SpeculatorsConfig, VerifierConfig  # type: ignore[import-not-found]
from speculators.models.eagle3 import (  # type: ignore[import-not-found]
    Eagle3DraftModel,
    Eagle3SpeculatorConfig,
)
from speculators.models.eagle3.data import shift_batch  # type: ignore[import-not-found]
from speculators.proposals.greedy import (  # type: ignore[import-not-found]
    GreedyTokenProposalConfig,
)
from torch import Tensor
from transformers import LlamaConfig


def build_model(layer: LlamaConfig, draft_vocab_size: int, attention: str) -> Eagle3DraftModel:
    """Return the model with the package's own first weights, and no vocabulary yet."""
    layer._attn_implementation = attention  # noqa: SLF001 (how the package's own code selects it)
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=draft_vocab_size,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    return Eagle3DraftModel(config)


def one_row(
    starts: Sequence[int], *, ids: Tensor, aux: Tensor, last: Tensor, loss_mask: Tensor
) -> Mapping[str, Tensor]:
    """Return the model's arguments for packed sequences: one row, each shorter by one token.

    The loss mask is moved by one token more than in the package, so that the same positions count
    as in ours.
    """
    samples = []
    for start, end in pairwise(starts):
        here = slice(start, end)
        mask = loss_mask[here]
        sample = {
            "input_ids": ids[here],
            "hidden_states": aux[here],
            "verifier_last_hidden_states": last[here],
            "loss_mask": torch.cat([mask[1:], torch.zeros_like(mask[:1])]),
            "lengths": torch.tensor([end - start]),
            "position_ids": torch.arange(end - start),
        }
        samples.append(shift_batch(sample))
    lengths = torch.cat([sample.pop("lengths") for sample in samples])
    row = {key: torch.cat([sample[key] for sample in samples]).unsqueeze(0) for key in samples[0]}
    document = torch.arange(len(samples)).repeat_interleave(lengths)
    return {**row, "document_ids": document.unsqueeze(0)}
