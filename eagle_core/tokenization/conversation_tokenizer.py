"""Convert conversations to token ids and loss masks with the tokenizer's chat template.

Invariant: the ids before every supervised token are the serving context, which is the ids of the
earlier messages with the generation prompt, then the answer so far. Spans come from comparing
renderings (`row_planner`) and from the tokenizer's offsets (`row_encoder`).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message, TokenRow
from eagle_core.data.ledger import LedgerEntry, Reason, RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample
from eagle_core.tokenization.assistant_turns import Row
from eagle_core.tokenization.chat_format import chat_formats
from eagle_core.tokenization.chat_template import TemplateRefusedError
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.row_encoder import (
    RowEncoder,
    exact_backend,
    given_sample,
    truncate,
)
from eagle_core.tokenization.row_planner import RowPlanner
from eagle_core.tokenization.served_template import served_template
from eagle_core.tokenization.template_source import TemplateSource, template_source

OnRejected = Callable[[RejectedRecord], None]
OnChanged = Callable[[LedgerEntry], None]


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
        self._formats = chat_formats(
            source, tokenizer, config, backend=self._backend, stop_ids=declared
        )
        self._identity = _identity(config, source)
        self.served_template = served_template(source, config)
        """Jinja text for servers; None if that of the weights will do."""
        self.stop_ids = declared | self._formats.end_ids
        if not self.stop_ids:
            raise ConfigError(
                f"nothing ends an answer of {self.name}: generation_config.json, config.json and "
                "the tokenizer name no end of text, and the chat template writes no token behind "
                "an answer; set eos_token_id in generation_config.json, or `chat_template`"
            )
        self.tokenizer_fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        added = self._backend.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        self._special_ids = frozenset(special)
        always = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
        control = self._formats.control_tokens({*special.values()}) | always
        self._control_ids = tuple(
            sorted(number for number, token in added.items() if token.content in control)
        )
        self._planner = RowPlanner(
            self._formats,
            config,
            control=control,
            stops={added[one].content for one in self.stop_ids if one in added},
            begin=str(tokenizer.bos_token or ""),
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
    def template_fingerprint(self) -> str:
        """Digest of the configuration and of the template for conversations without tools.

        A template for tools (`tool_use`) is left out: this is part of the identity of stores and of
        answers given here. A store names its samples by their tokens, so samples of another
        template for tools are other samples, and those without tools stay. Only a server answers
        where there are tools. Token files are named by `masks_fingerprint`, too.
        """
        template = self._formats.plain.template.fingerprint
        return _sha256({"template": template, "config": self._identity})

    @property
    def masks_fingerprint(self) -> str:
        """Digest of what decides on tokens and masks besides tokenizer and plain template."""
        return _sha256(self._formats.fingerprint)

    def ends_text(self) -> str:
        """Return in words what ends an answer, for the log."""
        names = [f"{self._backend.id_to_token(one)} ({one})" for one in sorted(self.stop_ids)]
        found = sorted(self._formats.end_ids)
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
        self._planner.refuse_control_tokens(messages, location="")
        try:
            rendering = self._formats.for_tools(tools).template.render(
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
        rows = self._planner.plan(conversation).rows
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
                    planned = self._planner.plan(conversation)
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

    def _is_token(self, number: int) -> bool:
        return 0 <= number < self.vocab_size and self._backend.id_to_token(number) is not None


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def _identity(config: TemplateConfig, source: TemplateSource) -> dict[str, object]:
    """Return the configuration as JSON, with the text of a template that it names by its file."""
    own = {"chat_template": source.default} if config.chat_template not in {None, "plain"} else {}
    return {**config.model_dump(mode="json"), **own}


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _batched(
    conversations: Iterable[Conversation], batch_size: int
) -> Iterator[list[Conversation]]:
    remaining = iter(conversations)
    while batch := list(islice(remaining, batch_size)):
        yield batch
