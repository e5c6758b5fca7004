"""Parse text that a chat template already rendered back into turns, or refuse it.

The text between turns is learned from the template, by rendering known turns. A text is accepted
only if the parsed turns render to exactly that text. Its masks are then those of any other
conversation. Where no control token separates the turns, a heading inside an answer could not be
distinguished from a turn, so every text is refused.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from eagle_core.data.conversation import Message, Role
from eagle_core.errors import EagleCoreError
from eagle_core.tokenization.chat_template import ChatTemplate, TemplateRefusedError

_PROBES = ("Qprobe0Q", "Qprobe1Q", "Qprobe2Q", "Qprobe3Q", "Qprobe4Q")


class NotOfTemplateError(EagleCoreError):
    """The text cannot be verified as the template's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Marks:
    """Text that the template writes around turns."""

    openings: tuple[tuple[str, str | None], ...]
    """Text before the first user turn: (before, None) or (before, after a system turn)."""
    before_answer: str
    before_question: str
    ending: str


class RenderedTextReader:
    """Parses texts that one chat template rendered."""

    def __init__(self, template: ChatTemplate, *, control: Iterable[str], begin: str) -> None:
        """Learn the template's marks.

        Args:
            template: the template that rendered the texts.
            control: the control tokens that it writes; they are never part of a message.
            begin: the first token, which a text may lack because tokenizers add it.

        """
        self._template = template
        self._begin = begin
        try:
            marks = _marks(template)
        except TemplateRefusedError:
            marks = None
        tokens = tuple(control)
        separated = marks is not None and all(
            any(token in mark for token in tokens)
            for mark in (marks.before_answer, marks.before_question)
        )
        self._marks = marks if separated else None

    def read(self, text: str) -> tuple[Message, ...]:
        """Return the turns; raise `NotOfTemplateError` unless they render to exactly this text."""
        if self._marks is None:
            raise NotOfTemplateError(
                "the template does not write its turns in order, separated by control tokens"
            )
        detail = "it does not begin and end like the template's text"
        candidates = [text]
        if self._begin and not text.startswith(self._begin):
            candidates.append(self._begin + text)
        for candidate in candidates:
            for messages in _parses(candidate.rstrip(), self._marks):
                if not all(message.content.strip() for message in messages):
                    detail = "it has an empty turn"
                    continue
                place = self._difference(messages, candidate.rstrip())
                if place is None:
                    return messages
                detail = f"its turns, re-rendered, differ at character {place}"
        raise NotOfTemplateError(detail)

    def _difference(self, messages: Sequence[Message], text: str) -> int | None:
        """Return the first character where the rendering of `messages` differs; None if none."""
        farthest = 0
        for thinking in (False, True):
            try:
                rendering = self._template.render(
                    [message.as_openai() for message in messages],
                    thinking=thinking,
                    add_generation_prompt=False,
                )
            except TemplateRefusedError:
                continue
            found = rendering.text.rstrip()
            if found == text:
                return None
            pairs = zip(found, text, strict=False)
            same = next((at for at, (one, two) in enumerate(pairs) if one != two), None)
            farthest = max(farthest, min(len(found), len(text)) if same is None else same)
        return farthest


def _marks(template: ChatTemplate) -> _Marks | None:
    """Return the text around turns; None if turns are not written in order and once."""
    roles: tuple[Role, ...] = ("user", "assistant", "user", "assistant")
    plain = _between(template, roles)
    if plain is None:
        return None
    before, answer, question, _, ending = plain
    openings: list[tuple[str, str | None]] = [(before, None)]
    try:
        led = _between(template, ("system", *roles))
    except TemplateRefusedError:
        pass
    else:
        if led is None:  # a system turn that moves: two conversations could have the same text
            return None
        openings.append((led[0], led[1]))
    return _Marks(
        openings=tuple(openings), before_answer=answer, before_question=question, ending=ending
    )


def _between(template: ChatTemplate, roles: Sequence[Role]) -> list[str] | None:
    probes = _PROBES[: len(roles)]
    turns = [{"role": role, "content": probe} for role, probe in zip(roles, probes, strict=True)]
    text = template.render(turns, add_generation_prompt=False).text
    if any(text.count(probe) != 1 for probe in probes):
        return None
    places = [text.index(probe) for probe in probes]
    if places != sorted(places):
        return None
    ends = [place + len(probe) for place, probe in zip(places, probes, strict=True)]
    edges = zip((0, *ends), (*places, len(text)), strict=True)
    return [text[left:right] for left, right in edges]


def _parses(text: str, marks: _Marks) -> Iterator[tuple[Message, ...]]:
    """Yield the parses of `text` into turns, one per opening of the template."""
    ending = marks.ending.rstrip()
    if not text.endswith(ending):
        return
    body = text.removesuffix(ending)
    for before, after_system in marks.openings:
        if not body.startswith(before):
            continue
        rest = body.removeprefix(before)
        system: tuple[Message, ...] = ()
        if after_system is not None:
            content, mark, rest = rest.partition(after_system)
            if not mark:
                continue
            system = (Message(role="system", content=content),)
        exchanges = _exchanges(rest, marks)
        if exchanges is not None:
            yield (*system, *exchanges)


def _exchanges(text: str, marks: _Marks) -> tuple[Message, ...] | None:
    """Return alternating questions and answers; None if the text does not end with an answer."""
    messages: list[Message] = []
    while True:
        question, mark, text = text.partition(marks.before_answer)
        if not mark:
            return None
        answer, mark, text = text.partition(marks.before_question)
        messages += (
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        )
        if not mark:
            return tuple(messages)
