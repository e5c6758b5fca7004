"""One conversation with the target: each question after the target's own earlier answers."""

import hashlib
from collections.abc import Iterator, Sequence

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason
from eagle_core.regeneration.answers import AnswerSource, NoAnswer, Question
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.journal import FinishedConversation
from eagle_core.regeneration.source_rows import SourceRow
from eagle_core.regeneration.turns import open_turns


async def answer_conversation(
    entry: SourceRow,
    earlier: FinishedConversation | None,
    source: AnswerSource,
    config: RegenerationConfig,
) -> FinishedConversation:
    """Ask the questions that `earlier` leaves, until one has no answer or is answered by a call."""
    answers = list(earlier.answers) if earlier else []
    num_tokens = earlier.num_tokens if earlier else 0
    failure: Reason | None = None
    detail = ""
    if entry.conversation.rendered_text:
        failure, detail = Reason.NO_MESSAGES, "rendered text has no questions to ask"
    for index, question in _questions(entry, answers, seed=config.seed):
        try:
            answer = await source.ask(question)
        except NoAnswer as error:
            failure, detail = error.reason, f"turn {index}: {error.detail}"
            break
        answers.append(answer.message)
        num_tokens += answer.num_tokens
    return FinishedConversation(
        key=entry.key,
        conversation_id=entry.conversation.conversation_id,
        answers=tuple(answers),
        failure=failure,
        detail=detail,
        num_tokens=num_tokens,
        context_tokens=config.context_tokens if failure is Reason.CONTEXT_TOO_LONG else None,
    )


def _questions(
    entry: SourceRow, answers: Sequence[Message], *, seed: int
) -> Iterator[tuple[int, Question]]:
    """Yield each turn's index and question; its answer must be in `answers` afterwards."""
    history: list[Message] = []
    for number, turn in enumerate(open_turns(entry.conversation)):
        history += turn.asked
        if number == len(answers):
            yield (
                turn.index,
                Question(
                    messages=tuple(history),
                    tools=entry.conversation.tools,
                    seed=_seed(seed, entry.key, turn.index),
                ),
            )
        history.append(answers[number])
        if answers[number].tool_calls:
            return


def _seed(seed: int, key: str, turn: int) -> int:
    """Return the seed of one answer: 31 bits, which every server accepts."""
    digest = hashlib.sha256(f"{seed} {key} {turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
