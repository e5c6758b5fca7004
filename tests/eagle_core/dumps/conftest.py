"""Rows of the tiny target, and what completes them."""

from pathlib import Path

import pytest

from eagle_core.dumps.completion import Completion, Limits, TargetShape
from eagle_core.dumps.template import first_token, template_mask
from eagle_core.target.config import TargetConfig
from eagle_core.target.final_head import FinalHead
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from eagle_core.target.tokenizer import conversation_tokenizer
from tests.dumped import PADDING, Row, rows, tokenized


@pytest.fixture(scope="session")
def target(tiny_target_path: Path) -> TargetConfig:
    """The tiny target, in float32 on the CPU."""
    return TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def dumped(target: TargetConfig) -> list[Row]:
    """Six conversations with their states."""
    return rows(target, tokenized(target, 6))


@pytest.fixture(scope="session")
def completion(target: TargetConfig) -> Completion:
    """Completes rows of the tiny target, with their own masks."""
    tokenizer = conversation_tokenizer(target)
    return Completion(
        shape=TargetShape(
            aux_layers=(1, 3, 4),
            hidden_size=64,
            vocab_size=tokenizer.vocab_size,
            padding_ids=frozenset({0, PADDING}),
            stop_ids=frozenset(tokenizer.stop_ids),
            first_id=first_token(tokenizer),
        ),
        limits=Limits(max_length=512, min_supervised_tokens=1),
        end=FinalHead.load(target, cure="no"),
        mask="dump",
        template_mask=lambda ids: template_mask(tokenizer, ids),
        recompute_model=RecomputeModel.load(target),
    )
