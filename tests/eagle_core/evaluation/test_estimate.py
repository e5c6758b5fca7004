"""The estimate from stored states replays what real decoding would do."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_plain, generate_speculative
from eagle_core.decoding.trace import VerificationRound
from eagle_core.errors import ConfigError
from eagle_core.evaluation.estimate import estimate_acceptance, expected_length, judge, replay
from eagle_core.samples import HiddenStateSample, TokenizedSample, sample_id
from eagle_core.target.capture import capture_states
from eagle_core.target.model import TargetModel
from tests.eagle_core.decoding.float64_target import load_float64_target
from tests.eagle_core.decoding.oracle_draft import OracleDraft
from tests.eagle_core.one_sample_source import OneSampleSource

PROMPT = [5, 17, 90, 33, 8, 120]


@pytest.fixture(scope="module")
def target(tiny_target_path: Path) -> TargetModel:
    return load_float64_target(tiny_target_path)


def captured(target: TargetModel, ids: list[int], answer: slice) -> HiddenStateSample:
    """Return the target's states of `ids`, whose assistant tokens are `answer`."""
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[answer] = True
    array = np.array(ids, dtype=np.int32)
    sample = TokenizedSample(sample_id=sample_id(array, mask), input_ids=array, loss_mask=mask)
    (states,) = capture_states(target, [sample])
    return states


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_on_the_targets_own_text_the_rounds_are_those_of_real_decoding(
    target: TargetModel, draft_tokens: int
) -> None:
    config = DecodingConfig(max_new_tokens=30, draft_tokens=draft_tokens)
    longer = config.model_copy(update={"max_new_tokens": 60})
    text = [*PROMPT, *generate_plain(target, PROMPT, longer).tokens]
    wrong_at = {6, 7, 13, 20, 21}
    vocab_size = target.model_config.vocab_size
    trace = generate_speculative(target, OracleDraft(text, vocab_size, wrong_at), PROMPT, config)
    sample = captured(target, text[:40], slice(len(PROMPT), 40))
    rounds = replay(OracleDraft(text, vocab_size, wrong_at), sample, draft_tokens=draft_tokens)
    # The text's end cuts the last round, as a stop token would.
    num_common = min(len(rounds), len(trace.rounds)) - 1
    assert num_common > 3
    assert rounds[:num_common] == list(trace.rounds[:num_common])
    estimate = estimate_acceptance(
        OracleDraft(text, vocab_size, wrong_at),
        OneSampleSource(sample),
        draft_tokens=draft_tokens,
        num_samples=1,
    )
    assert estimate.on_policy == 1
    assert estimate.num_rounds == len(rounds)
    assert 1 < estimate.acceptance_length < draft_tokens + 1


def test_a_verdict_ends_where_the_text_leaves_the_targets_choice() -> None:
    # The target would say 1 2 3 4 5; the text says 1 9 3 4 5; the draft agrees with the target.
    found = judge([1, 2, 3], [1, 2, 3, 4, 5], [1, 9, 3, 4, 5])
    assert found == VerificationRound(verified=2, accepted=2, gained=2)
    # A token that only the text has is a miss: serving never sees it.
    found = judge([1, 9, 3], [1, 2, 3, 4, 5], [1, 9, 3, 4, 5])
    assert found == VerificationRound(verified=3, accepted=1, gained=2)
    # The answer ends inside the chain.
    found = judge([1, 2, 3], [1, 2], [1, 2])
    assert found == VerificationRound(verified=2, accepted=2, gained=2)


def test_expected_length_multiplies_conditional_shares() -> None:
    by_depth = np.array([[0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.8, math.nan, math.nan]])
    assert expected_length(by_depth) == pytest.approx([1.875, 4.0, 1.8])


def test_nothing_to_replay_is_an_error(target: TargetModel) -> None:
    sample = captured(target, PROMPT, slice(5, 6))
    draft = OracleDraft(PROMPT, target.model_config.vocab_size)
    with pytest.raises(ConfigError, match="long enough"):
        estimate_acceptance(draft, OneSampleSource(sample), draft_tokens=2, num_samples=1)


def test_each_answer_of_a_conversation_is_replayed_behind_its_own_prompt(
    target: TargetModel,
) -> None:
    ids = torch.randint(3, 300, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    mask = np.zeros(30, dtype=np.bool_)
    mask[5:12] = True
    mask[20:30] = True
    array = np.array(ids, dtype=np.int32)
    sample = TokenizedSample(sample_id=sample_id(array, mask), input_ids=array, loss_mask=mask)
    (states,) = capture_states(target, [sample])
    draft = OracleDraft(ids, target.model_config.vocab_size)
    rounds = replay(draft, states, draft_tokens=2)
    # Random text is never the target's choice: each round moves on by one token.
    assert [verdict.gained for verdict in rounds] == [1] * (6 + 9)
