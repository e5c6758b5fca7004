"""Template and stop token: training must see the texts that serving sends and receives.

What is compared are token ids: those before each answer of the run's data with the generation
prompt of the target's own template, and those that end an answer with what a server stops on.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from eagle_core.diagnosis.finding import Finding, not_checked
from eagle_core.samples import TokenizedSample

TEMPLATE, STOP = "template", "stop token"
TOKENS_AGAIN = "eyas run evaluate RECIPE builds them again"
_NEARLY_ALL = 0.98
_SHOWN_TOKENS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationForm:
    """How answers begin and end in a run's data, and in serving."""

    changed: tuple[str, ...]
    """Which of tokenizer and template are no longer those that the run recorded."""
    has_own_template: bool
    """Whether the target brings a template; else any that serving uses is right."""
    num_answers: int
    """Answers that were looked at."""
    num_prompted: int
    """Of these, how many follow the generation prompt of the target's own template."""
    context: str = ""
    """Text before an answer that does not."""
    own_context: str = ""
    """Text that the target's own template writes there."""
    num_whole: int
    """Answers whose end is in their sample."""
    num_stopped: int
    """Of these, how many end with a token on which a server stops."""
    ending: str = ""
    """Text of the last token of an answer that does not."""
    stops: str = ""
    """The tokens on which a server stops, as text."""
    lost_stops: str = ""
    """Stop tokens that the run recorded and the target no longer names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormCounts:
    """Answers of samples, compared with prompts and stop tokens."""

    num_answers: int
    num_prompted: int
    odd_context: tuple[int, ...]
    """Ids before the first answer that follows no generation prompt."""
    num_whole: int
    num_stopped: int
    odd_ending: int | None
    """Last id of the first whole answer that does not end with a stop token."""

    @classmethod
    def of(
        cls,
        samples: Iterable[TokenizedSample],
        *,
        prompts: Collection[Sequence[int]],
        stop_ids: Collection[int],
        max_length: int,
    ) -> Self:
        """Count the answers of `samples`, none of which is longer than `max_length` tokens.

        `prompts` are the ids with which a context may end; those behind the end of an answer that
        `max_length` cut are unknown, so that it is not counted as whole.
        """
        num_answers = num_prompted = num_whole = num_stopped = 0
        odd_context: tuple[int, ...] = ()
        odd_ending = None
        for sample in samples:
            ids = sample.input_ids.tolist()
            for start, end in _answers(sample):
                num_answers += 1
                is_prompted = any(ids[:start][-len(prompt) :] == [*prompt] for prompt in prompts)
                num_prompted += is_prompted
                if not is_prompted and not odd_context:
                    odd_context = tuple(ids[max(0, start - _SHOWN_TOKENS) : start])
                if end == len(ids) >= max_length:
                    continue
                num_whole += 1
                num_stopped += ids[end - 1] in stop_ids
                if ids[end - 1] not in stop_ids and odd_ending is None:
                    odd_ending = ids[end - 1]
        return cls(
            num_answers=num_answers,
            num_prompted=num_prompted,
            odd_context=odd_context,
            num_whole=num_whole,
            num_stopped=num_stopped,
            odd_ending=odd_ending,
        )


def common_ending(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the ids with which all of `prompts` end: behind questions that differ."""
    ending: list[int] = []
    for ids in zip(*(reversed(prompt) for prompt in prompts), strict=False):
        if len(set(ids)) > 1:
            break
        ending.append(ids[0])
    return tuple(reversed(ending))


def check_template(form: ConversationForm | str) -> Finding:
    """Return whether the data has the template of serving; `form` may be why that is unknown."""
    if isinstance(form, str):
        return not_checked(TEMPLATE, form, TOKENS_AGAIN)
    if form.changed:
        return Finding(
            check=TEMPLATE,
            state="problem",
            found=f"the target's {' and '.join(form.changed)} changed since the run began",
            expected="that of training, in serving too",
            what_to_do="restore the target's files or target.template as they were, or compute "
            "the states again and train another run",
        )
    if not form.has_own_template:
        return Finding(
            check=TEMPLATE,
            state="ok",
            found="the target brings no template; serve it with target.template",
        )
    if not form.num_answers or not form.own_context:
        return not_checked(
            TEMPLATE,
            "the target's own template writes nothing between question and answer"
            if form.num_answers
            else "no sample has an answer",
            "compare a rendered sample with what the server sends",
        )
    share = form.num_prompted / form.num_answers
    found = f"{share:.1%} of {form.num_answers:,} answers follow the target's own prompt"
    if share >= _NEARLY_ALL:
        return Finding(check=TEMPLATE, state="ok", found=found)
    return Finding(
        check=TEMPLATE,
        state="problem" if share < 0.5 else "notice",  # after a tool, a prompt may be another
        found=f"{found}; others follow {form.context!r}",
        expected=f"{form.own_context!r} before each answer, as a server writes it",
        what_to_do="remove target.template.chat_template, or serve the target with that template; "
        "token ids and rendered text must come from the target's own template",
    )


def check_stop(form: ConversationForm | str) -> Finding:
    """Return whether answers end as in serving."""
    if isinstance(form, str):
        return not_checked(STOP, form, TOKENS_AGAIN)
    if form.lost_stops:
        return Finding(
            check=STOP,
            state="problem",
            found=f"the target no longer stops on {form.lost_stops}, as it did in training",
            expected="the same stop tokens",
            what_to_do="restore eos_token_id in generation_config.json",
        )
    if not form.num_whole:
        return not_checked(STOP, "max_length cut every answer", "raise dataset.max_length")
    share = form.num_stopped / form.num_whole
    found = f"{share:.1%} of {form.num_whole:,} whole answers end with {form.stops}"
    if share >= _NEARLY_ALL:
        return Finding(check=STOP, state="ok", found=found)
    return Finding(
        check=STOP,
        state="problem" if share < 0.5 else "notice",
        found=f"{found}; others end with {form.ending!r}",
        expected="a token on which a server stops",
        what_to_do="check the chat template and eos_token_id: the draft never learns where an "
        "answer ends",
    )


def _answers(sample: TokenizedSample) -> list[tuple[int, int]]:
    """Return (first, one past last) of each answer."""
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
