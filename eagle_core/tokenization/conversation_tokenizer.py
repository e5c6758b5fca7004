"""Convert conversations to token ids and loss masks with the tokenizer's chat template.

Invariant: the ids before every supervised token are the serving context, which is the ids of the
earlier messages with the generation prompt, then the answer so far. Spans come from comparing
renderings (`assistant_turns`) and from the tokenizer's offsets (`row_encoder`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message, TokenRow
from eagle_core.data.ledger import Change, LedgerEntry, Reason, RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample
from eagle_core.tokenization.assistant_turns import AssistantTurn, Row, find_turns, plan_rows
from eagle_core.tokenization.chat_format import ChatFormat, chat_format
from eagle_core.tokenization.chat_template import TemplateRefusedError
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.rendered_text import NotOfTemplateError, RenderedTextReader
from eagle_core.tokenization.row_encoder import (
    RowEncoder,
    exact_backend,
    given_sample,
    truncate,
)
from eagle_core.tokenization.template_source import TemplateSource, template_source
from eagle_core.tokenization.unrendered import find_unrendered, refuse_unwritten_calls

OnRejected = Callable[[RejectedRecord], None]
OnChanged = Callable[[LedgerEntry], None]
_Messages = Sequence[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """The rows of one conversation, before they are tokenised."""

    conversation: Conversation
    rows: list[Row]
    unrendered: tuple[Change, ...]

    def entries(self) -> Iterator[LedgerEntry]:
        """Yield what the ledger says of it."""
        for change in self.unrendered:
            yield LedgerEntry.of_change(
                change,
                location=self.conversation.location or self.conversation.conversation_id,
                conversation_id=self.conversation.conversation_id,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A row of text to encode, or the token ids of a record."""

    conversation: Conversation
    row: Row | None = None
    given: TokenRow | None = None


class ConversationTokenizer:
    """Tokenises conversations with one target model's tokenizer and template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: TemplateConfig | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        """Wrap a fast tokenizer.

        Args:
            tokenizer: the target's tokenizer, with its chat template.
            config: how conversations are rendered.
            stop_ids: the ids on which a server stops, from the model's configuration; the
                tokenizer's end of text and the template's end of turn are added.

        Raises:
            ConfigError: it is slow, has no usable template, or nothing ends an answer.

        """
        config = config or TemplateConfig()
        self.name = str(tokenizer.name_or_path)
        self._config = config
        self._init_args = (tokenizer, config, frozenset(stop_ids))
        self._backend = exact_backend(tokenizer, self.name)
        self._encoder = RowEncoder(self._backend)
        source = template_source(tokenizer, config)
        self._undeclared = sorted(one for one in stop_ids if not self._is_token(one))
        declared = (frozenset(stop_ids) | _end_of_text(tokenizer)) - {*self._undeclared}
        compiled = partial(
            chat_format,
            tokenizer=tokenizer,
            config=config,
            backend=self._backend,
            stop_ids=declared,
        )
        self._plain = compiled(source.default)
        self._with_tools = (
            compiled(source.with_tools, for_tools=True) if source.with_tools else self._plain
        )
        self._template = self._plain.template
        self.template_fingerprint = _sha256(
            {"template": self._template.fingerprint, "config": _identity(config, source)}
        )
        self.stop_ids = declared | self._plain.end.token_ids | self._with_tools.end.token_ids
        if not self.stop_ids:
            raise ConfigError(
                f"nothing ends an answer of {self.name}: generation_config.json, config.json and "
                "the tokenizer name no end of text, and the chat template writes no token behind "
                "an answer; set eos_token_id in generation_config.json, or `chat_template`"
            )
        self.tokenizer_fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, one in added.items() if one.special)
        control = self._control_tokens(
            [token.content for token in added.values() if token.special],
            [tokenizer.bos_token, tokenizer.eos_token],
        )
        self._control_ids = tuple(
            sorted(number for number, token in added.items() if token.content in control)
        )
        self._control = _any_of(control)
        self._stops = _any_of(added[one].content for one in self.stop_ids if one in added)
        self._reader = RenderedTextReader(
            self._template, control=control, begin=str(tokenizer.bos_token or "")
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the constructor's arguments: compiled templates cannot be pickled."""
        return type(self), self._init_args

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the target model's may be larger (padding)."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def tokens_from(self, first: int) -> dict[int, str]:
        """Return the tokens whose ids are `first` or above, by id."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return {number: token for token, number in vocabulary.items() if number >= first}

    @property
    def masks_fingerprint(self) -> str:
        """Digest of what decides on the masks besides tokenizer and template."""
        formats = [self._plain.fingerprint, self._with_tools.fingerprint]
        return _sha256([self._with_tools.template.fingerprint, formats])

    def ends_text(self) -> str:
        """Return in words what ends an answer, for the log."""
        names = [f"{self._backend.id_to_token(one)} ({one})" for one in sorted(self.stop_ids)]
        found = sorted(self._plain.end.token_ids | self._with_tools.end.token_ids)
        if not found:
            return (
                f"the chat template of {self.name} writes no token behind an answer: its end is "
                f"not supervised; a server stops on {', '.join(names)}"
            )
        ends = " or ".join(str(self._backend.id_to_token(one)) for one in found)
        ignored = (
            f"; {self._undeclared} are no tokens of this tokenizer" if self._undeclared else ""
        )
        return f"an answer ends with {ends}; a server stops on {', '.join(names)}{ignored}"

    def special_token_ids(self) -> tuple[int, ...]:
        """Return the ids that every draft vocabulary must contain: begin, end, the template's.

        Excludes the tokens that a tokenizer merely reserves (256 in Llama 3, thousands in Gemma 3).
        """
        return tuple(sorted({*self._control_ids, *self.stop_ids}))

    def token(self, number: int) -> str:
        """Return the token of an id."""
        return str(self._backend.id_to_token(number))

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Return the text of `ids`, special tokens included."""
        return str(self._backend.decode(ids.tolist(), skip_special_tokens=False))

    def prompt(
        self, messages: Sequence[Message], *, tools: str = "", thinking: bool | None = None
    ) -> NDArray[np.int32]:
        """Return the ids of the serving context before the next answer.

        If `thinking` is None, `enable_thinking` of the configuration applies, which may leave it to
        the template. Raises `RejectedRecord`, without a location, wherever `tokenize` would.
        """
        self._refuse_control_tokens(messages, location="")
        try:
            rendering = self._format_for(tools).template.render(
                [message.as_openai() for message in messages],
                tools=json.loads(tools) if tools else None,
                thinking=self._config.enable_thinking if thinking is None else thinking,
                add_generation_prompt=True,
            )
        except TemplateRefusedError as error:
            raise RejectedRecord(Reason.TEMPLATE_REFUSED, "", str(error)) from error
        return self._encoder.encode(rendering.text)

    def answer_text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, as a server sends it.

        Raises `RejectedRecord`, without a location, if it contains special tokens.
        """
        inside = [number for number in ids if number in self._special_ids]
        if inside:
            token = self._backend.id_to_token(inside[0])
            raise RejectedRecord(Reason.SPECIAL_TOKEN_IN_TEXT, "", f"the answer contains {token}")
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def tokenize(self, conversation: Conversation) -> tuple[TokenizedSample, ...]:
        """Return one sample, or more if the template rewrites history (see `assistant_turns`).

        Samples are not truncated. Raises `RejectedRecord`, located by conversation id, if the
        template refuses the turns or a message contains the text of a control token.
        """
        if conversation.tokens is not None:
            return (given_sample(conversation.tokens),)
        rows = self._plan(conversation).rows
        return tuple(sample for samples in self._encoder.samples(rows) for sample in samples)

    def tokenize_all(
        self,
        conversations: Iterable[Conversation],
        *,
        max_length: int,
        min_supervised_tokens: int = 1,
        on_rejected: OnRejected | None = None,
        on_changed: OnChanged | None = None,
        batch_size: int = 32,
    ) -> Iterator[TokenizedSample]:
        """Yield samples of at most `max_length` tokens in order, one batch in memory at a time.

        Rejections (template, control tokens, too few supervised tokens after truncation) are passed
        to `on_rejected`; what the template does not write of a conversation that is kept, to
        `on_changed`.
        """
        reject = on_rejected or (lambda _rejected: None)
        change = on_changed or (lambda _entry: None)
        for batch in _batched(conversations, batch_size):
            pending: list[_Pending] = []
            for conversation in batch:
                if conversation.tokens is not None:
                    pending.append(_Pending(conversation=conversation, given=conversation.tokens))
                    continue
                try:
                    planned = self._plan(conversation)
                except RejectedRecord as rejected:
                    reject(rejected)
                    continue
                pending += (_Pending(conversation=conversation, row=row) for row in planned.rows)
                for entry in planned.entries():
                    change(entry)
            for conversation, sample in self._encoded(pending):
                cut = truncate(sample, max_length)
                num_supervised = int(cut.loss_mask.sum())
                if num_supervised >= min_supervised_tokens:
                    yield replace(cut, location=conversation.location)
                    continue
                detail = f"{num_supervised} in the first {len(cut)} of {len(sample)} tokens"
                reason = Reason.TOO_FEW_SUPERVISED_TOKENS
                reject(RejectedRecord(reason, conversation.conversation_id, detail))

    def _encoded(
        self, pending: Sequence[_Pending]
    ) -> Iterator[tuple[Conversation, TokenizedSample]]:
        """Yield all samples in order; texts are encoded together."""
        encoded = self._encoder.samples([one.row for one in pending if one.row is not None])
        for one in pending:
            samples = next(encoded) if one.given is None else [given_sample(one.given)]
            for sample in samples:
                yield one.conversation, sample

    def _refuse_control_tokens(self, messages: Sequence[Message], *, location: str) -> None:
        for index, message in enumerate(messages):
            for text in (message.content, message.reasoning_content):
                if found := self._control.search(text):
                    raise RejectedRecord(
                        Reason.SPECIAL_TOKEN_IN_TEXT, location, f"turn {index} contains {found[0]}"
                    )

    def _plan(self, conversation: Conversation) -> _Planned:
        if conversation.rendered_text:
            conversation = self._read_back(conversation)
        self._refuse_control_tokens(conversation.messages, location=conversation.conversation_id)
        if self._config.reasoning == "drop":
            answers = tuple(message.without_reasoning() for message in conversation.messages)
            conversation = replace(conversation, messages=answers)
        used = self._format_for(conversation.tools)
        thinking = self._thinks(conversation)
        refuse_unwritten_calls(used.template, conversation, thinking=thinking)
        try:
            turns = find_turns(
                used.template,
                conversation,
                used.end,
                enable_thinking=self._config.enable_thinking,
            )
            self._refuse_inner_stops(turns)
            unrendered = find_unrendered(used.template, conversation, turns, thinking=thinking)
        except TemplateRefusedError as error:
            raise RejectedRecord(
                Reason.TEMPLATE_REFUSED, conversation.conversation_id, str(error)
            ) from error
        if not turns:
            detail = "its record excludes every answer from the loss"
            reason = Reason.TOO_FEW_SUPERVISED_TOKENS
            raise RejectedRecord(reason, conversation.conversation_id, detail)
        return _Planned(
            conversation=conversation,
            rows=plan_rows(turns, last_turn_only=self._config.last_turn_only),
            unrendered=unrendered,
        )

    def _thinks(self, conversation: Conversation) -> bool:
        """Return whether serving would request reasoning for an answer of this conversation."""
        if self._config.enable_thinking is not None:
            return self._config.enable_thinking
        return any(message.reasoning for message in conversation.messages)

    def _refuse_inner_stops(self, turns: Sequence[AssistantTurn]) -> None:
        for turn in turns:
            found = self._stops.search(turn.text, turn.start, turn.content_end)
            if found and found.end() < turn.content_end:
                raise TemplateRefusedError(
                    f"{found[0]}, on which a server stops, is inside an answer"
                )

    def _is_token(self, number: int) -> bool:
        return 0 <= number < self.vocab_size and self._backend.id_to_token(number) is not None

    def _read_back(self, conversation: Conversation) -> Conversation:
        try:
            messages = self._reader.read(conversation.rendered_text)
        except NotOfTemplateError as error:
            raise RejectedRecord(
                Reason.TEXT_NOT_OF_TEMPLATE, conversation.conversation_id, str(error)
            ) from error
        return replace(conversation, messages=messages, rendered_text="")

    def _render(self, messages: _Messages, *, add_generation_prompt: bool = False) -> str:
        rendering = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        return rendering.text

    def _format_for(self, tools: str) -> ChatFormat:
        return self._with_tools if tools else self._plain

    def _control_tokens(self, added: Iterable[str], always: Iterable[str | None]) -> set[str]:
        """Return the added tokens that the template itself writes, and `always`."""
        turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        try:
            text = self._render(turns, add_generation_prompt=True)
        except TemplateRefusedError:  # it takes no system turn
            text = self._render(turns[1:], add_generation_prompt=True)
        ends: set[str] = set()
        for used in (self._plain, self._with_tools):
            text += used.end.closing + used.end.ending + used.end.call_ending
            ends |= {*used.end.tokens}
        named = {token for token in always if token} | ends
        return {token for token in added if token in text} | named


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def _identity(config: TemplateConfig, source: TemplateSource) -> dict[str, object]:
    """Return the configuration as JSON, with the text of a template that it names by its file."""
    own = {"chat_template": source.default} if config.chat_template not in {None, "plain"} else {}
    return {**config.model_dump(mode="json"), **own}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts))) or "(?!)")


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _batched(
    conversations: Iterable[Conversation], batch_size: int
) -> Iterator[list[Conversation]]:
    remaining = iter(conversations)
    while batch := list(islice(remaining, batch_size)):
        yield batch
