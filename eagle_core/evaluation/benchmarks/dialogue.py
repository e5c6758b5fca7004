"""Questions and the target's own answers to them, turn after turn.

Invariant: the prompt of a later turn holds the answers that this target gave to the earlier ones,
as its chat template renders them. A turn that cannot be asked ends its dialogue, and is counted.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.evaluation.benchmarks.question import Question
from eagle_core.evaluation.prompts import Prompt
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

Answer = Callable[[Sequence[tuple[int, ...]]], Sequence[Sequence[int]]]
"""Decodes prompts plainly: returns the new tokens of each, a stop token included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLimits:
    """How long prompts may be."""

    asked: int
    """Tokens of a prompt, without those of the target's own answers in it."""
    room: int | None = None
    """Tokens of a prompt, all counted; None if the target's positions are no limit."""

    def allow(self, num_tokens: int, *, answered: int = 0) -> bool:
        """Return whether a prompt is short enough, `answered` of whose tokens are answers."""
        fits = self.room is None or num_tokens <= self.room
        return fits and 0 < num_tokens <= self.asked + answered


@dataclass(slots=True)
class Dialogue:
    """One question during the sweep."""

    question: Question
    turn: int = 1
    messages: tuple[Message, ...] = ()
    num_answered: int = 0
    """Tokens of the target's answers so far."""

    def prompt(self, tokenizer: ConversationTokenizer, benchmark: str) -> Prompt:
        """Return the prompt of the turn that is due.

        Raises:
            RejectedRecord: the template refuses the messages.

        """
        messages = (*self.question.messages, *self.messages)
        ids = tokenizer.prompt(messages, tools=self.question.tools)
        return Prompt(
            input_ids=tuple(ids.tolist()),
            category=self.question.category,
            benchmark=benchmark,
            turn=self.turn,
        )

    def go_on(
        self, answer: Sequence[int], tokenizer: ConversationTokenizer, stop_ids: Collection[int]
    ) -> None:
        """Add the target's answer and what is asked after it.

        Raises:
            RejectedRecord: the answer holds special tokens, so that no server could send it back.

        """
        kept = answer[:-1] if answer and answer[-1] in stop_ids else answer
        text = tokenizer.answer_text(kept)
        asked = self.question.later_turns[self.turn - 1]
        self.messages += (
            Message(role="assistant", content=text),
            Message(role="user", content=asked),
        )
        self.num_answered += len(kept)
        self.turn += 1


@dataclass(kw_only=True, slots=True)
class Dialogues:
    """The chosen questions of one set."""

    name: str
    questions: Sequence[Question]
    left_out: Counter[str] = field(default_factory=Counter)
    """Why turns were not asked, and how many of them."""

    def ask(
        self,
        tokenizer: ConversationTokenizer,
        answer: Answer,
        *,
        limits: PromptLimits,
        stop_ids: Collection[int],
    ) -> list[Prompt]:
        """Return the prompts of all turns, first turns first; earlier turns are answered for it."""
        prompts: list[Prompt] = []
        dialogues = [Dialogue(question) for question in self.questions]
        while dialogues:
            asked = [found for one in dialogues if (found := self._due(one, tokenizer, limits))]
            prompts += [prompt for _, prompt in asked]
            unended = [one for one in asked if one[0].turn < one[0].question.num_turns]
            answers = answer([prompt.input_ids for _, prompt in unended]) if unended else ()
            dialogues = [
                dialogue
                for (dialogue, _), tokens in zip(unended, answers, strict=True)
                if self._goes_on(dialogue, tokens, tokenizer, stop_ids)
            ]
        if not prompts:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
            raise ConfigError(f"benchmark {self.name}: no question can be asked ({reasons})")
        return prompts

    def _due(
        self, dialogue: Dialogue, tokenizer: ConversationTokenizer, limits: PromptLimits
    ) -> tuple[Dialogue, Prompt] | None:
        """Return a dialogue with the prompt that is due; None ends it."""
        try:
            prompt = dialogue.prompt(tokenizer, self.name)
        except RejectedRecord as error:
            self.left_out[f"turn {dialogue.turn}: {error.reason}"] += 1
            return None
        if not limits.allow(len(prompt.input_ids), answered=dialogue.num_answered):
            self.left_out[f"turn {dialogue.turn}: too long"] += 1
            return None
        return dialogue, prompt

    def _goes_on(
        self,
        dialogue: Dialogue,
        answer: Sequence[int],
        tokenizer: ConversationTokenizer,
        stop_ids: Collection[int],
    ) -> bool:
        try:
            dialogue.go_on(answer, tokenizer, stop_ids)
        except RejectedRecord as error:
            self.left_out[f"turn {dialogue.turn + 1}: {error.reason} in the answer before"] += 1
            return False
        return True
