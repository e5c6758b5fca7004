"""What ends an answer: the token that follows it in context, or a token on which a server stops.

Learned once per template from renderings of probes. Masks, stop tokens, evaluation, regeneration
and the draft vocabulary all use this one definition. Most templates write a marker behind every
answer (`<|im_end|>`). Some write nothing, and the marker of the next role ends the answer (GLM-4.5:
`<|user|>`). Some write another token behind the last answer only: behind it (Phi-3: end of text,
which the model never says there) or instead (harmony: `<|return|>`, on which a server stops).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

from tokenizers import Tokenizer

from eagle_core.tokenization.chat_template import ChatTemplate, TemplateRefusedError

_QUESTION = {"role": "user", "content": "a"}
_NEXT = "Qprobe1Q"
_CALL_ID = "call00001"
"""Nine characters, as Mistral's templates require."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerEnd:
    """What one template writes behind an answer, and which part of it the model generates."""

    closing: str
    """Text behind the content of an answer that ends a rendering."""
    ending: str
    """Text behind the content up to and including the token that ends it.

    A line break behind that token belongs to the template. Without such a token: the closing.
    """
    call_ending: str
    """Text that ends a tool call behind which the template writes nothing; empty if unknown."""
    token_ids: frozenset[int]
    """The ids of the last tokens of both endings."""
    tokens: tuple[str, ...] = ()
    """Their texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Token:
    """An added token in a text."""

    token_id: int
    content: str
    upto: str
    """The text up to and including the token."""
    is_special: bool


def learn_answer_end(
    template: ChatTemplate,
    backend: Tokenizer,
    stop_ids: Collection[int],
    *,
    tools: Sequence[object] | None = None,
) -> AnswerEnd:
    """Return what ends an answer; raise `TemplateRefusedError` if no answer can be rendered.

    `stop_ids` are the tokens on which the model's own configuration says that a server stops.
    `tools` are offered in every probe.
    """
    probes = _Probes(template, backend, tools)
    closing = common_end(*(probes.render(_answer(text)) for text in "xy"))
    found = _ending(probes.added(probes.following()), probes.added(closing), stop_ids)
    stops = {*stop_ids, *([found.token_id] if found else [])}
    closes_call, follows_call = probes.call_end(stops)
    ends = [token for token in (found, closes_call or follows_call) if token]
    return AnswerEnd(
        closing=closing,
        ending=found.upto if found else closing.rstrip(),
        call_ending=follows_call.upto if follows_call and not closes_call else "",
        token_ids=frozenset(token.token_id for token in ends),
        tokens=tuple(dict.fromkeys(token.content for token in ends)),
    )


class _Probes:
    """Renderings of short conversations."""

    def __init__(
        self, template: ChatTemplate, backend: Tokenizer, tools: Sequence[object] | None
    ) -> None:
        self._template = template
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._tools = tools

    def render(self, *behind: dict[str, object]) -> str:
        """Return one question with these turns behind it."""
        rendering = self._template.render(
            [_QUESTION, *behind], tools=self._tools, add_generation_prompt=False
        )
        return rendering.text

    def following(self) -> str:
        """Return the text between an answer and the next question; empty if not in this order."""
        question: dict[str, object] = {"role": "user", "content": _NEXT}
        try:
            one, two = (self.render(_answer(text), question) for text in "xy")
        except TemplateRefusedError:
            return ""
        between, found, _ = common_end(one, two).partition(_NEXT)
        return between if found else ""

    def call_end(self, stop_ids: Collection[int]) -> tuple[_Token | None, _Token | None]:
        """Return the token that closes a call, and the one that follows it in context."""
        result: dict[str, object] = {"role": "tool", "content": _NEXT, "name": "f"}
        try:
            alone, other = self.render(_call("f")), self.render(_call("g"))
            followed = self.render(_call("f"), {**result, "tool_call_id": _CALL_ID})
        except TemplateRefusedError:
            return None, None
        if alone == other:  # it writes no calls
            return None, None
        behind = self._at_end(alone)
        is_in_order = followed.startswith(alone) and _NEXT in followed
        between = followed[len(alone) :].partition(_NEXT)[0] if is_in_order else ""
        follows = self.added(between)[:1]
        closes = [token for token in behind if token.token_id in stop_ids]
        if not closes and not any(token.token_id in stop_ids for token in follows):
            closes = [token for token in behind[-1:] if token.is_special]
        return next(iter(closes), None), next(iter(follows), None)

    def _at_end(self, text: str) -> list[_Token]:
        """Return the tokens with which a text ends, with nothing but white space between them."""
        tokens, rest = [], text.rstrip()
        for token in reversed(self.added(rest)):
            if token.upto != rest:
                break
            tokens.append(token)
            rest = rest.removesuffix(token.content).rstrip()
        return tokens[::-1]

    def added(self, text: str) -> list[_Token]:
        """Return the added tokens of a text in order, without those of white space (Gemma 3's)."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return [
            _Token(
                token_id=number,
                content=self._added[number].content,
                upto=text[:end],
                is_special=self._added[number].special,
            )
            for number, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if number in self._added and self._added[number].content.strip()
        ]


def common_end(one: str, two: str) -> str:
    """Return the longest common suffix."""
    length = 0
    while length < min(len(one), len(two)) and one[-1 - length] == two[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _answer(text: str) -> dict[str, object]:
    return {"role": "assistant", "content": text}


def _ending(
    in_context: Sequence[_Token], at_end: Sequence[_Token], stop_ids: Collection[int]
) -> _Token | None:
    """Return the token that ends an answer, from those in context and those at the end."""
    pairs = zip(in_context, at_end, strict=False)
    in_both = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def stops(tokens: Sequence[_Token]) -> list[_Token]:
        return [token for token in tokens if token.token_id in stop_ids]

    def special(tokens: Sequence[_Token]) -> list[_Token]:
        return [token for token in tokens if token.is_special]

    candidates = [
        *stops(in_both),
        *in_both[::-1],
        *stops(in_context),
        *stops(at_end),
        *special(at_end),
        *special(in_context),
    ]
    return candidates[0] if candidates else None


def _call(name: str) -> dict[str, object]:
    function = {"name": name, "arguments": {"a": "b"}}
    call = {"type": "function", "id": _CALL_ID, "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
