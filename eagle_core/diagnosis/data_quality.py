"""What the data allows: whose answers it has, which tokens can be drafted, and what was cut."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from eagle_core.diagnosis.conversation_form import TOKENS_AGAIN
from eagle_core.diagnosis.finding import Finding, not_checked
from eagle_core.evaluation.estimate import own_choices
from eagle_core.samples import HiddenStateSample

ANSWERS, VOCABULARY, CUT = "answers", "vocabulary", "samples cut"
OWN_ANSWERS = 0.9
"""Share from which answers count as the target's own: all of greedy ones, but for rounding."""
_FOREIGN_ANSWERS = 0.7
_GOOD_COVERAGE, _LOW_COVERAGE = 0.95, 0.75
_MUCH_CUT = 0.1
_REGENERATE = (
    "let the target answer the questions itself (eyas run regenerate RECIPE), and train on these "
    "answers"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """The target's choices at the answers of some samples."""

    num_tokens: int
    """Answer tokens that were looked at."""
    num_own: int
    """Of these, how many are the target's own choice, its argmax."""
    num_drafted: int
    """Choices that the draft vocabulary has."""

    @classmethod
    def count(cls, samples: Iterable[HiddenStateSample], t2d: NDArray[np.bool_]) -> Self:
        """Count the choices at the answers of `samples`; `t2d` [V] is the draft vocabulary."""
        num_tokens = num_own = num_drafted = 0
        for sample in samples:
            own = own_choices(sample)
            num_tokens += len(own)
            num_own += int(own.sum())
            num_drafted += int(t2d[sample.target_argmax[:-1][sample.loss_mask[1:]]].sum())
        return cls(num_tokens=num_tokens, num_own=num_own, num_drafted=num_drafted)

    @property
    def own_share(self) -> float:
        """Share of the answers' tokens that the target would have written, 0 to 1."""
        return self.num_own / max(self.num_tokens, 1)

    @property
    def coverage(self) -> float:
        """Share of its choices that the draft can propose, 0 to 1."""
        return self.num_drafted / max(self.num_tokens, 1)


def check_answers(choices: Choices | str) -> Finding:
    """Return whether the answers are what the target itself writes."""
    if isinstance(choices, str):
        return not_checked(ANSWERS, choices, "name the store (--set store.root=...)")
    found = f"{choices.own_share:.1%} of {choices.num_tokens:,} tokens are the target's own choice"
    if choices.own_share >= OWN_ANSWERS:
        return Finding(check=ANSWERS, state="ok", found=found)
    is_foreign = choices.own_share < _FOREIGN_ANSWERS
    whose = (
        "the answers are another author's, or the target sampled them"
        if is_foreign
        else "the target sampled the answers, or some are another author's"
    )
    return Finding(
        check=ANSWERS,
        state="problem" if is_foreign else "notice",
        found=f"{found}: {whose}",
        expected=f"{OWN_ANSWERS:.0%} or more; in serving the draft follows the target's own text",
        what_to_do=f"{_REGENERATE}; its own answers have such a share only if it sampled them "
        "(regeneration.temperature above 0): then it is as it should be if you serve at that "
        "temperature",
    )


def check_vocabulary(
    choices: Choices | str,
    *,
    draft_tokens: int,
    size: int,
    training_coverage: float,
    of: str = "held-out text",
) -> Finding:
    """Return how much of the target's choices the draft can propose: it limits acceptance.

    Args:
        choices: the target's choices, or why they are unknown. Nothing replaces them: the draft's
            tokens were chosen to cover those of the training answers.
        draft_tokens: K.
        size: of the draft vocabulary.
        training_coverage: share of the training answers' tokens, told where choices are unknown.
        of: where the choices are from.

    """
    if isinstance(choices, str):
        return not_checked(
            VOCABULARY,
            f"{choices}; the draft's {size:,} tokens were chosen from the training answers and "
            f"have {training_coverage:.1%} of their tokens, which is more than of new text",
            "name the store (--set store.root=...)",
        )
    coverage = choices.coverage
    found = f"{coverage:.1%} of the target's choices on {of} are among the draft's {size:,} tokens"
    if coverage >= _GOOD_COVERAGE:
        return Finding(check=VOCABULARY, state="ok", found=found)
    limit = sum(coverage**depth for depth in range(draft_tokens + 1))
    return Finding(
        check=VOCABULARY,
        state="problem" if coverage < _LOW_COVERAGE else "notice",
        found=f"{found}: no training gets beyond about {limit:.1f} tokens per target forward",
        expected=f"{_GOOD_COVERAGE:.0%} or more",
        what_to_do="train another run with a larger training.draft_vocab_size (eyas plan RECIPE "
        "--candidates compares sizes)",
    )


def check_cut(num_cut: int | str, num_samples: int, *, max_length: int) -> Finding:
    """Return how many samples `max_length` cut: their ends are never trained on."""
    if isinstance(num_cut, str):
        return not_checked(CUT, num_cut, TOKENS_AGAIN)
    share = num_cut / max(num_samples, 1)
    found = f"{num_cut:,} of {num_samples:,} samples ({share:.0%}) end at max_length {max_length:,}"
    if share <= _MUCH_CUT:
        return Finding(check=CUT, state="ok", found=found)
    return Finding(
        check=CUT,
        state="notice",
        found=found,
        expected=f"{_MUCH_CUT:.0%} or fewer: what is cut off is never trained on",
        what_to_do="raise dataset.max_length, and compute the states of what is new",
    )
