"""Several benchmark sets for one evaluation: the chosen questions, and their prompts."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from eagle_core.data.ledger import RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.benchmarks.dialogue import Answer, Dialogue, Dialogues, PromptLimits
from eagle_core.evaluation.benchmarks.question import Question, spread_over_categories
from eagle_core.evaluation.benchmarks.question_file import QuestionFile
from eagle_core.evaluation.prompts import Prompt
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenSet:
    """The questions of one set that are asked."""

    dialogues: Dialogues
    source: str
    """What was read, exactly."""
    num_without_text: int
    """Records without a text that were passed over."""

    @property
    def name(self) -> str:
        """Name of the set."""
        return self.dialogues.name

    @property
    def num_turns(self) -> int:
        """Largest number of turns of a question."""
        return max(question.num_turns for question in self.dialogues.questions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """All sets of an evaluation."""

    sets: tuple[ChosenSet, ...]
    tokenizer: ConversationTokenizer
    limits: PromptLimits

    @classmethod
    def choose(
        cls,
        configs: Sequence[BenchmarkConfig],
        *,
        num_questions: int,
        tokenizer: ConversationTokenizer,
        limits: PromptLimits,
    ) -> "Sweep":
        """Read the sets, and choose `num_questions` of each that are short enough.

        Raises:
            ConfigError: a file is missing, is no such set, or has no question that is short enough.
            CorruptError: a file is damaged.
            TransientError: the hub is unreachable, and a file is not in its cache.

        """
        sets = tuple(_chosen(config, num_questions, tokenizer, limits) for config in configs)
        return cls(sets=sets, tokenizer=tokenizer, limits=limits)

    @property
    def num_answers(self) -> int:
        """Most answers that are decoded only to ask what follows them."""
        questions = (question for one in self.sets for question in one.dialogues.questions)
        return sum(len(question.later_turns) for question in questions)

    @property
    def num_prompts(self) -> int:
        """Most prompts of all turns."""
        return self.num_answers + sum(len(one.dialogues.questions) for one in self.sets)

    def longest_answered(self, new_tokens: int) -> int:
        """Return the most tokens of a prompt that is answered only for the turn after it.

        Each of the target's own answers in it has at most `new_tokens`.
        """
        turns = max(one.num_turns for one in self.sets)
        longest = self.limits.asked + max(turns - 2, 0) * new_tokens
        return longest if self.limits.room is None else min(longest, self.limits.room)

    def prompts(self, answer: Answer, *, stop_ids: Collection[int]) -> list[Prompt]:
        """Return the prompts of all turns, set after set; `answer` decodes the earlier turns.

        Raises:
            ConfigError: no question of a set can be asked.

        """
        return [
            prompt
            for one in self.sets
            for prompt in one.dialogues.ask(
                self.tokenizer, answer, limits=self.limits, stop_ids=stop_ids
            )
        ]


def _chosen(
    config: BenchmarkConfig,
    num_questions: int,
    tokenizer: ConversationTokenizer,
    limits: PromptLimits,
) -> ChosenSet:
    file = QuestionFile.find(config)
    num_long: Counter[str] = Counter()
    short = _short(file, tokenizer, limits, num_long)
    if file.is_categorised:
        questions = spread_over_categories(list(short), num_questions)
    else:
        questions = list(islice(short, num_questions))
    if not questions:
        raise ConfigError(
            f"benchmark {config.name}: no question of {file.path} is short enough or has a text "
            f"({sum(num_long.values())} too long, {file.num_without_text} without a text); "
            f"{_longer(limits) if num_long else ''}give another file"
        )
    return ChosenSet(
        dialogues=Dialogues(name=config.name, questions=questions, left_out=num_long),
        source=file.source,
        num_without_text=file.num_without_text,
    )


def _longer(limits: PromptLimits) -> str:
    """Return what to do for longer questions to be asked."""
    if limits.room is not None and limits.room <= limits.asked:
        return (
            f"lower evaluation.max_new_tokens, which leaves {max(limits.room, 0):,} of the "
            "target's positions to a prompt, or "
        )
    return "raise evaluation.max_prompt_tokens, or "


def _short(
    file: QuestionFile,
    tokenizer: ConversationTokenizer,
    limits: PromptLimits,
    num_long: Counter[str],
) -> Iterator[Question]:
    """Yield the questions that are short enough; count the others."""
    for question in file.questions():
        try:
            prompt = Dialogue(question).prompt(tokenizer, file.config.name)
        except RejectedRecord as error:
            raise ConfigError(
                f"{question.location} of benchmark {file.config.name} cannot be asked: {error}; "
                "remove it from the file"
            ) from error
        if limits.allow(len(prompt.input_ids)):
            yield question
        else:
            num_long["turn 1: too long"] += 1
