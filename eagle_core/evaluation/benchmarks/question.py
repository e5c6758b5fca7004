"""A question of a benchmark: what is asked first, and what is asked after the target's answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from eagle_core.data.conversation import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One record of a benchmark."""

    messages: tuple[Message, ...]
    """Up to the target's first answer."""
    later_turns: tuple[str, ...] = ()
    """What the user asks after each answer of the target."""
    tools: str = ""
    """JSON text of the available tools; empty if there are none."""
    category: str = ""
    location: str = ""

    @property
    def num_turns(self) -> int:
        """Number of answers that are asked for."""
        return 1 + len(self.later_turns)


def spread_over_categories(questions: Sequence[Question], count: int) -> list[Question]:
    """Return `count` questions, as many of each category as possible, the first ones of each.

    They are in the order of the file, as `questions` are.
    """
    by_category: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_category[question.category].append(index)
    in_rounds = chain.from_iterable(zip_longest(*by_category.values()))
    chosen = islice((index for index in in_rounds if index is not None), count)
    return [questions[index] for index in sorted(chosen)]
