"""How a draft of every variant begins, and which tensors it has."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from eagle_core.draft.layout import expected_shapes
from eagle_core.draft.projection import with_width
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError
from tests.eagle_core.random_source import VOCAB_SIZE, random_draft, random_head
from tests.eagle_core.training.test_ttt import VARIANTS, random_case

DRAWN_SUM = 0.9574
"""Of the fusing matrix that versions before the variants drew with this seed."""


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant) or "plain")
def test_its_tensors_are_those_of_the_published_layout(variant: dict[str, Any]) -> None:
    draft, _, _ = random_case(0, [4], **variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in draft.published_tensors().items()}
    assert shapes == expected_shapes(draft.config)


def test_biases_begin_at_zero_and_norms_at_one() -> None:
    draft, _ = random_draft(num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    biases = {name: p for name, p in draft.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 2 * 7
    assert not any(bias.any() for bias in biases.values())
    norms = {name: p for name, p in draft.named_parameters() if "norm" in name}
    assert all((norm == 1).all() for norm in norms.values())


def test_the_weights_of_a_plain_draft_are_drawn_as_they_were() -> None:
    """Runs that have begun must find the same draft again; a variant changes nothing before it."""
    plain, _ = random_draft()
    longer, _ = random_draft(num_hidden_layers=2, attention_bias=True)
    assert torch.equal(longer.fc.weight, plain.fc.weight)
    assert torch.equal(longer.midlayer.mlp.down_proj.weight, plain.midlayer.mlp.down_proj.weight)
    assert round(float(plain.fc.weight.detach().double().sum()), 4) == DRAWN_SUM


@pytest.mark.parametrize("size", [4, 16, 24])
def test_another_width_keeps_the_products_of_rows_as_far_as_it_can(size: int) -> None:
    rows = random_head() * torch.logspace(1, -3, 16)
    found = with_width(rows, size)
    assert found.shape == (VOCAB_SIZE, size)
    errors = (found @ found.T - rows @ rows.T).norm() / (rows @ rows.T).norm()
    assert errors < (0.02 if size < 16 else 1e-6)
    best = torch.linalg.svdvals(rows.double())[size:]
    left = (rows.double().norm() ** 2 - found.double().norm() ** 2).clamp(min=0)
    assert float(left) == pytest.approx(float(best.square().sum()), rel=1e-3, abs=1e-3)


def test_the_target_must_have_the_width_that_the_draft_expects() -> None:
    draft, head = random_draft(hidden_size=12)
    vocabulary = DraftVocabulary.build(np.arange(VOCAB_SIZE, dtype=np.int64), size=30)
    with pytest.raises(ConfigError, match=r"target width \(\(50, 16\), 30\) got an embedding"):
        draft.initialise(embedding=head[:, :12], lm_head=head, vocabulary=vocabulary, seed=0)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"qk_norm": True, "mlp_bias": True}, "do not go together"),
        ({"target_head": True}, r"set training\.draft_vocab_size to 50"),
        (
            {"target_head": True, "draft_vocab_size": 50, "hidden_size": 12},
            "set hidden_size to 16",
        ),
    ],
)
def test_combinations_that_no_engine_computes_are_refused(
    variant: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        random_draft(**variant)
