"""Sets are asked turn after turn, with the target's own answers between, and summed up."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from eagle_core.decoding.trace import GenerationTrace, VerificationRound
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import PromptResult
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.benchmarks.dialogue import PromptLimits
from eagle_core.evaluation.benchmarks.report import sweep_report
from eagle_core.evaluation.benchmarks.sweep import Sweep
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.prompts import Prompt
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from tests.eagle_core.evaluation.benchmarks.files import write_sets

STOP = "<|im_end|>"
Ids = Sequence[tuple[int, ...]]
ROOMY = PromptLimits(asked=500)


@pytest.fixture
def tokenizer(tiny_target_path: Path) -> ConversationTokenizer:
    return ConversationTokenizer(AutoTokenizer.from_pretrained(tiny_target_path))


def choose(
    tokenizer: ConversationTokenizer,
    folder: Path,
    names: Sequence[str],
    *,
    num_questions: int = 9,
    limits: PromptLimits = ROOMY,
) -> Sweep:
    paths = write_sets(folder)
    configs = [BenchmarkConfig(name=name, path=str(paths[name])) for name in names]
    return Sweep.choose(configs, num_questions=num_questions, tokenizer=tokenizer, limits=limits)


class Echo:
    """Answers each prompt with a text of its own, and a stop token."""

    def __init__(self, tokenizer: ConversationTokenizer, text: str = "Well {}.") -> None:
        self.tokenizer, self.text = tokenizer, text
        self.asked: list[str] = []

    def __call__(self, prompts: Ids) -> list[list[int]]:
        answers = []
        for ids in prompts:
            self.asked.append(self.tokenizer.decode(np.array(ids)))
            text = self.text.format(len(self.asked)) + STOP
            answers.append(self.tokenizer._backend.encode(text).ids)
        return answers


def texts(tokenizer: ConversationTokenizer, prompts: Sequence[Prompt]) -> list[str]:
    return [tokenizer.decode(np.array(prompt.input_ids)) for prompt in prompts]


def test_a_later_turn_follows_the_targets_own_answers(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    sweep = choose(tokenizer, tmp_path, ["gsm8k", "speed-bench"])
    assert (sweep.num_answers, sweep.num_prompts) == (2, 6)
    answer = Echo(tokenizer)
    prompts = sweep.prompts(answer, stop_ids=tokenizer.stop_ids)
    assert [(one.benchmark, one.category, one.turn) for one in prompts] == [
        ("gsm8k", "", 1),
        ("gsm8k", "", 1),
        ("speed-bench", "coding", 1),
        ("speed-bench", "roleplay", 1),
        ("speed-bench", "roleplay", 2),
        ("speed-bench", "roleplay", 3),
    ]
    asked = texts(tokenizer, prompts)
    assert asked[-1] == (
        "<|im_start|>user\nYou are a falcon.<|im_end|>\n<|im_start|>assistant\nWell 1.<|im_end|>\n"
        "<|im_start|>user\nWhat do you eat?<|im_end|>\n<|im_start|>assistant\nWell 2.<|im_end|>\n"
        "<|im_start|>user\nAnd in winter?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer.asked == asked[3:5]  # the last turn is nobody's context


def test_what_is_too_long_is_counted_and_own_answers_do_not_count(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    names = ["speed-bench"]
    free = choose(tokenizer, tmp_path, names)
    asked = free.prompts(Echo(tokenizer), stop_ids=tokenizer.stop_ids)
    second = len(asked[2].input_ids)
    wordy = Echo(tokenizer, "rivers have 7 properties " * 20 + "{}")
    sweep = choose(tokenizer, tmp_path, names, limits=PromptLimits(asked=second + 1))
    found = sweep.prompts(wordy, stop_ids=tokenizer.stop_ids)
    assert [prompt.turn for prompt in found] == [1, 1, 2]
    assert len(found[2].input_ids) > second + 1
    assert sweep.sets[0].dialogues.left_out == {"turn 3: too long": 1}
    assert sweep.longest_answered(40) == second + 1 + 40

    tight = choose(tokenizer, tmp_path, names, limits=PromptLimits(asked=500, room=second))
    found = tight.prompts(wordy, stop_ids=tokenizer.stop_ids)
    assert [prompt.turn for prompt in found] == [1, 1]
    assert tight.sets[0].dialogues.left_out == {"turn 2: too long": 1}
    assert tight.longest_answered(40) == second

    with pytest.raises(ConfigError, match=r"speed-bench: no question.*2 too long, 1 without"):
        choose(tokenizer, tmp_path, names, limits=PromptLimits(asked=3))


def test_an_answer_that_no_server_could_send_back_ends_the_dialogue(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    sweep = choose(tokenizer, tmp_path, ["mt-bench"], num_questions=2)
    found = sweep.prompts(Echo(tokenizer, "<|im_start|>{}"), stop_ids=tokenizer.stop_ids)
    assert [(one.category, one.turn) for one in found] == [("writing", 1), ("math", 1)]
    ((reason, count),) = sweep.sets[0].dialogues.left_out.items()
    assert (reason.startswith("turn 2: special_token"), count) == (True, 2)


def result(*accepted: int, plain: bool = True) -> PromptResult:
    rounds = tuple(VerificationRound(verified=3, accepted=n, gained=n + 1) for n in accepted)
    trace = GenerationTrace(tokens=(1, 2), rounds=rounds, seconds=1.0, prefill_seconds=0.1)
    slow = GenerationTrace(tokens=(1, 2), seconds=2.0, prefill_seconds=0.1)
    return PromptResult(speculative=trace, plain=slow if plain else None)


def test_the_report_has_sets_turns_categories_and_their_mean(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    sweep = choose(tokenizer, tmp_path, ["mt-bench", "math-500"], num_questions=2)
    prompts = sweep.prompts(Echo(tokenizer), stop_ids=tokenizer.stop_ids)
    assert [prompt.turn for prompt in prompts] == [1, 1, 2, 2, 1]
    after = [result(0), result(2), result(1), result(3), result(3)]
    before = [result(0)] * 5
    found = sweep_report(sweep, prompts, before, after, draft_tokens=3)
    bench, maths = found.sets
    assert (bench.num_questions, bench.trained.num_prompts) == (2, 4)
    assert bench.trained.acceptance_length == pytest.approx(2.5)
    assert {turn: part.acceptance_length for turn, part in bench.by_turn.items()} == {1: 2, 2: 3}
    assert {name: part.acceptance_length for name, part in bench.by_category.items()} == {
        "math": 3.5,
        "writing": 1.5,
    }
    assert (maths.by_turn, maths.by_category) == ({}, {})
    assert bench.untrained is not None
    mean = found.mean
    assert mean.acceptance_length == pytest.approx((2.5 + 4) / 2)
    assert mean.untrained_length == 1
    assert mean.speedup == pytest.approx(2)
    low, high = mean.acceptance_interval
    assert 2.5 < low < mean.acceptance_length < high <= 4
    assert mean.acceptance_by_depth == pytest.approx(((3 / 4 + 1) / 2, (2 / 3 + 1) / 2, 3 / 4))

    without = sweep_report(sweep, prompts, [], [result(0, plain=False)] * 5, draft_tokens=3)
    assert without.mean.untrained_length is None
    assert without.mean.speedup is None
    assert math.isnan(without.mean.acceptance_by_depth[1])


def test_settings_name_sets_or_files() -> None:
    config = EvaluationConfig.model_validate(
        {"benchmarks": ["mt-bench", {"name": "own", "path": "own.jsonl"}]}
    )
    assert [one.name for one in config.benchmark_sets] == ["mt-bench", "own"]
    with pytest.raises(ValueError, match="two of `benchmarks` have one name"):
        EvaluationConfig.model_validate({"benchmarks": ["gsm8k", {"name": "gsm8k"}]})
    with pytest.raises(ValueError, match="`prompts` or `benchmarks`, not both"):
        EvaluationConfig.model_validate({"benchmarks": ["gsm8k"], "prompts": "own.jsonl"})
    with pytest.raises(ValueError, match="mt-bench"):
        EvaluationConfig.model_validate({"benchmarks": ["mtbench"]})


@pytest.mark.parametrize(
    ("limits", "remedy"),
    [
        (PromptLimits(asked=2), "raise evaluation.max_prompt_tokens, or give another file"),
        (PromptLimits(asked=2, room=9), "raise evaluation.max_prompt_tokens, or"),
        (PromptLimits(asked=99, room=2), "lower evaluation.max_new_tokens, which leaves 2 of"),
        (PromptLimits(asked=99, room=-7), "lower evaluation.max_new_tokens, which leaves 0 of"),
    ],
)
def test_questions_that_are_all_too_long_name_the_setting_that_excludes_them(
    tokenizer: ConversationTokenizer, tmp_path: Path, limits: PromptLimits, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=rf"benchmark gsm8k: no question.*; {remedy}"):
        choose(tokenizer, tmp_path, ["gsm8k"], limits=limits)
