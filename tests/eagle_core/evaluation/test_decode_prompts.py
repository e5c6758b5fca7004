"""Evaluation decodes each prompt both ways and says where they differ."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from eagle_core.decoding.config import TreeConfig
from eagle_core.decoding.speculative import generate_plain
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import AcceptanceReport, summarise, summarise_by_category
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import EvaluationProgress, decode_prompts, mismatch_margin
from eagle_core.evaluation.prompts import Prompt, sample_prompts
from eagle_core.samples import TokenizedSample
from eagle_core.target.model import TargetModel
from tests.eagle_core.decoding.float64_target import load_float64_target
from tests.eagle_core.decoding.oracle_draft import OracleDraft

PROMPT = Prompt(input_ids=(5, 17, 90, 33, 8, 120), category="turn 1")


@pytest.fixture(scope="module")
def target(tiny_target_path: Path) -> TargetModel:
    return load_float64_target(tiny_target_path)


@pytest.fixture(scope="module")
def oracle(target: TargetModel) -> OracleDraft:
    """A draft that knows the target's text behind PROMPT and errs once."""
    config = EvaluationConfig(max_new_tokens=40)
    text = [*PROMPT.input_ids, *generate_plain(target, PROMPT.input_ids, config).tokens]
    return OracleDraft(text, target.model_config.vocab_size, wrong_at={9})


@pytest.fixture(scope="module")
def random_draft(target: TargetModel) -> DraftModel:
    vocabulary = DraftVocabulary.build(np.arange(target.model_config.vocab_size), size=100)
    draft = DraftModel(DraftConfig.from_target(target.model_config, draft_vocab_size=100)).double()
    head = target.lm_head_weight
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=1)
    return draft


def evaluate(
    target: TargetModel,
    draft: OracleDraft,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> AcceptanceReport:
    """Decode and sum up, as the flow does."""
    results = list(decode_prompts(target, draft, prompts, config, on_progress=on_progress))
    return summarise(results, draft_tokens=config.draft_tokens)


def test_sampled_results_depend_neither_on_the_batch_nor_on_the_order(
    target: TargetModel, random_draft: DraftModel
) -> None:
    prompts = [Prompt(input_ids=ids) for ids in ((5, 17), (7,), (60, 61, 62), (44, 45, 3), (9, 9))]
    found = {}
    for batch_prompts, given in ((1, prompts), (4, prompts), (3, prompts[::-1])):
        config = EvaluationConfig(
            max_new_tokens=12, draft_tokens=3, temperature=0.7, batch_prompts=batch_prompts, seed=2
        )
        results = list(decode_prompts(target, random_draft, given, config))
        found[batch_prompts] = {
            prompt: (result.speculative.tokens, result.plain and result.plain.tokens)
            for prompt, result in zip(given, results, strict=True)
        }
    assert found[1] == found[4] == found[3]
    assert len(set(found[1].values())) == 5


def test_a_report_counts_both_decodings(target: TargetModel, oracle: OracleDraft) -> None:
    config = EvaluationConfig(num_prompts=3, num_plain_prompts=2, max_new_tokens=20, draft_tokens=3)
    told: list[EvaluationProgress] = []
    report = evaluate(target, oracle, [PROMPT] * 5, config, on_progress=told.append)
    assert [progress.num_done for progress in told] == [1, 2, 3]
    assert (report.num_prompts, report.num_compared, report.num_matching) == (3, 2, 2)
    assert report.matches_plain
    assert report.largest_mismatch_margin is None
    assert report.num_tokens == 60
    assert 3 < report.acceptance_length < 4
    assert report.tokens_per_second > 0
    assert report.speedup is not None


def test_batches_of_prompts_give_the_same_report(
    target: TargetModel, random_draft: DraftModel
) -> None:
    prompts = [Prompt(input_ids=tuple(range(9, 12 + 3 * n))) for n in range(5)]
    config = EvaluationConfig(num_plain_prompts=3, max_new_tokens=8, draft_tokens=3)
    told: list[EvaluationProgress] = []
    alone = list(decode_prompts(target, random_draft, prompts, config))
    batched = config.model_copy(update={"batch_prompts": 2})
    found = list(decode_prompts(target, random_draft, prompts, batched, on_progress=told.append))
    assert [progress.num_done for progress in told] == [1, 2, 3, 4, 5]
    for one, other in zip(alone, found, strict=True):
        assert one.speculative.tokens == other.speculative.tokens
        assert one.speculative.rounds == other.speculative.rounds
        assert (one.plain is None) == (other.plain is None)
        assert one.matches_plain == other.matches_plain


def test_without_plain_decoding_there_is_no_speedup(
    target: TargetModel, oracle: OracleDraft
) -> None:
    config = EvaluationConfig(num_prompts=1, num_plain_prompts=0, max_new_tokens=8)
    report = evaluate(target, oracle, [PROMPT], config)
    assert report.plain_tokens_per_second is None
    assert report.speedup is None
    assert report.num_compared == 0


def test_sampled_texts_are_timed_but_not_compared(target: TargetModel, oracle: OracleDraft) -> None:
    text = oracle._text
    strays = OracleDraft(text, oracle._vocab_size, wrong_at=range(100))
    config = EvaluationConfig(num_prompts=1, max_new_tokens=5, draft_tokens=1, temperature=0.5)
    report = evaluate(target, strays, [PROMPT], config)
    assert (report.num_compared, report.num_matching) == (0, 0)
    assert report.plain_tokens_per_second is not None
    assert report.largest_mismatch_margin is None


def test_results_can_be_told_apart_by_category(target: TargetModel, oracle: OracleDraft) -> None:
    config = EvaluationConfig(num_plain_prompts=0, max_new_tokens=8)
    other = Prompt(input_ids=PROMPT.input_ids, category="turn 2")
    results = list(decode_prompts(target, oracle, [other, PROMPT, other], config))
    reports = summarise_by_category(results, draft_tokens=config.draft_tokens)
    assert {name: report.num_prompts for name, report in reports.items()} == {
        "turn 1": 1,
        "turn 2": 2,
    }


def test_the_margin_is_taken_where_two_texts_first_differ(target: TargetModel) -> None:
    config = EvaluationConfig(max_new_tokens=6)
    text = generate_plain(target, PROMPT.input_ids, config).tokens
    other = (*text[:3], (text[3] + 1) % target.model_config.vocab_size, text[4])
    assert mismatch_margin(target, PROMPT.input_ids, text, other) > 0
    assert mismatch_margin(target, PROMPT.input_ids, text, text[:4]) == float("inf")


def test_trees_are_decoded_if_they_are_asked_for(
    target: TargetModel, random_draft: DraftModel
) -> None:
    tree = TreeConfig(depth=2, top_k=10, nodes=200)
    config = EvaluationConfig(num_prompts=2, max_new_tokens=6, tree=tree)
    prompts = [Prompt(input_ids=tuple(range(9, 12 + 3 * n))) for n in range(2)]
    results = list(decode_prompts(target, random_draft, prompts, config))
    report = summarise(results, draft_tokens=config.drafted_depth)
    assert report.matches_plain
    assert len(report.acceptance_by_depth) == 2


def test_no_prompt_is_an_error(target: TargetModel, oracle: OracleDraft) -> None:
    with pytest.raises(ConfigError, match="no held-out prompt"):
        evaluate(target, oracle, [], EvaluationConfig())


def test_prompts_are_cut_where_each_answer_starts() -> None:
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 1], dtype=np.bool_)
    ids = np.arange(10, 18, dtype=np.int32)
    sample = TokenizedSample(sample_id="a", input_ids=ids, loss_mask=mask)
    first, second = sample_prompts([sample], num_prompts=9, max_tokens=9, max_turns=2)
    assert first == Prompt(input_ids=(10, 11), category="turn 1")
    assert second == Prompt(input_ids=tuple(range(10, 17)), category="turn 2")
    assert sample_prompts([sample], num_prompts=9, max_tokens=6, max_turns=2) == [first]
    other = dataclasses.replace(sample, sample_id="c", input_ids=np.append(ids[:7], np.int32(99)))
    both = sample_prompts([sample, other], num_prompts=9, max_tokens=9, max_turns=2)
    assert both == [first, second]  # another last answer is no other question
    headless = TokenizedSample(sample_id="b", input_ids=ids, loss_mask=np.ones(8, dtype=np.bool_))
    assert sample_prompts([headless], num_prompts=9, max_tokens=9) == []
