"""What a run decodes while it trains: the prompts of evaluate, on the device that was chosen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eagle_core.draft.config import DraftConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.prompts import Prompt
from eagle_core.samples import TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import read_model_config
from eagle_core.target.positions import Positions
from eagle_core.tokenization.token_file import write_token_file
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_decoder import VISIBLE_GPUS, DecodingPlace, decoding_place, drafts_to_decode
from flows.evaluate import num_beyond
from flows.workers.decoders import child_environment

TRAINING = TrainingConfig(decode_every=2)
DRAFT = DraftConfig(
    hidden_size=64,
    target_hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=416,
    draft_vocab_size=300,
)


@pytest.mark.parametrize("num_prompt", [100, 101, 104, 105, 106])
def test_near_the_position_limit_the_prompts_are_those_of_evaluate(
    tmp_path: Path, target: TargetConfig, num_prompt: int
) -> None:
    positions = Positions.of(read_model_config(target, weights.locate(target)))
    assert positions.limit is not None
    training = TRAINING.model_copy(update={"decode_new_tokens": positions.limit - 105})
    found = drafts_to_decode(
        target,
        training,
        DRAFT,
        held_out(tmp_path / "held_out.arrow", 9, num_prompt),
    )
    assert found is not None
    evaluation = EvaluationConfig(max_new_tokens=training.decode_new_tokens)
    asked = [Prompt(input_ids=(1,) * length) for length in (9, num_prompt)]
    num_long, _ = num_beyond(asked, positions, evaluation.positions_after_prompt)
    assert num_long == (0 if num_prompt == 100 else 1)
    assert [len(ids) for ids in found.prompts] == [9, num_prompt][: 2 - num_long]


def held_out(path: Path, *lengths: int) -> Path:
    """Write samples with prompts of these lengths, and one token to train on."""
    samples = [
        TokenizedSample(
            sample_id=str(length),
            input_ids=np.ones(length + 1, dtype=np.int32),
            loss_mask=np.arange(length + 1) == length,
        )
        for length in lengths
    ]
    return write_token_file(path, samples).path


def test_a_child_of_ranks_on_the_cpu_sees_the_gpus_that_their_parent_sees(
    target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TRAINING.model_copy(update={"decode_device": "cuda:1", "num_processes": 2})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def seen() -> str:
        """Return what the child sees, started by a rank, which sees none."""
        sent = decoding_place(target, training).model_dump_json()
        with monkeypatch.context() as rank:
            rank.setenv(VISIBLE_GPUS, "")
            return child_environment(DecodingPlace.model_validate_json(sent))[VISIBLE_GPUS]

    monkeypatch.setenv(VISIBLE_GPUS, "3,5")
    assert seen() == "3,5"
    monkeypatch.delenv(VISIBLE_GPUS)
    assert seen() == "0,1"
