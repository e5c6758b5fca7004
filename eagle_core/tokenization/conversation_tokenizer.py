"""Convert conversations to token ids and loss masks with the tokenizer's chat template.

Invariant: the ids before every supervised token are the serving context, which is the ids of the
earlier messages with the generation prompt, then the answer so far. Spans come from comparing
renderings and from the tokenizer's offsets. Where the tokenizer would merge the end of the prompt
with the answer, the row is tokenised in two pieces, as in serving.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.tokenization.assistant_turns import Closing, Row, common_end, find_turns, plan_rows
from eagle_core.tokenization.chat_template import PLAIN_TEMPLATE, ChatTemplate, TemplateRefusedError
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.rendered_text import NotOfTemplateError, RenderedTextReader

OnRejected = Callable[[RejectedRecord], None]
_MAX_CACHED_TAILS = 4096
_Messages = Sequence[Mapping[str, object]]


class ConversationTokenizer:
    """Tokenises conversations with one target model's tokenizer and template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig | None = None
    ) -> None:
        """Wrap a fast tokenizer; raise `ConfigError` if it is slow or has no usable template."""
        config = config or TemplateConfig()
        self.name = str(tokenizer.name_or_path)
        self._config = config
        self._init_args = (tokenizer, config)
        self._backend = _exact_offsets(tokenizer, self.name)
        self._template = _template(tokenizer, config, self.name)
        self.template_fingerprint = _sha256(
            {"template": self._template.fingerprint, "config": config.model_dump(mode="json")}
        )
        self.tokenizer_fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        added = self._backend.get_added_tokens_decoder()
        self._added_ids = np.array(sorted(added), dtype=np.int32)
        self._special_ids = frozenset(number for number, one in added.items() if one.special)
        self._anchor = next((token.content for token in added.values() if token.special), "")
        self._tails: dict[str, NDArray[np.int32]] = {}
        self._closing = self._find_closing()
        control = self._control_tokens(
            [token.content for token in added.values() if token.special],
            [tokenizer.bos_token, tokenizer.eos_token],
        )
        self._control_ids = tuple(
            sorted(number for number, token in added.items() if token.content in control)
        )
        self._control = re.compile("|".join(map(re.escape, sorted(control))) or "(?!)")
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

    def special_token_ids(self) -> tuple[int, ...]:
        """Return the ids that every draft vocabulary must contain: begin, end, the template's.

        Excludes the tokens that a tokenizer merely reserves (256 in Llama 3, thousands in Gemma 3).
        """
        return self._control_ids

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
            rendering = self._template.render(
                [message.as_openai() for message in messages],
                tools=json.loads(tools) if tools else None,
                thinking=self._config.enable_thinking if thinking is None else thinking,
                add_generation_prompt=True,
            )
        except TemplateRefusedError as error:
            raise RejectedRecord(Reason.TEMPLATE_REFUSED, "", str(error)) from error
        return self._encode(rendering.text)

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
        rows = self._rows(conversation)
        encodings = self._backend.encode_batch([row.text for row in rows], add_special_tokens=False)
        return tuple(
            sample
            for row, encoding in zip(rows, encodings, strict=True)
            for sample in self._samples(row, encoding)
        )

    def tokenize_all(
        self,
        conversations: Iterable[Conversation],
        *,
        max_length: int,
        min_supervised_tokens: int = 1,
        on_rejected: OnRejected | None = None,
        batch_size: int = 32,
    ) -> Iterator[TokenizedSample]:
        """Yield samples of at most `max_length` tokens in order, one batch in memory at a time.

        Rejections (template, control tokens, too few supervised tokens after truncation) are passed
        to `on_rejected`; without it, they are skipped.
        """
        reject = on_rejected or (lambda _rejected: None)
        for batch in _batched(conversations, batch_size):
            rows: list[tuple[Conversation, Row]] = []
            for conversation in batch:
                try:
                    planned = self._rows(conversation)
                except RejectedRecord as rejected:
                    reject(rejected)
                else:
                    rows += ((conversation, row) for row in planned)
            encodings = self._backend.encode_batch(
                [row.text for _, row in rows], add_special_tokens=False
            )
            for (conversation, row), encoding in zip(rows, encodings, strict=True):
                for sample in self._samples(row, encoding):
                    cut = truncate(sample, max_length)
                    num_supervised = int(cut.loss_mask.sum())
                    if num_supervised >= min_supervised_tokens:
                        yield replace(cut, location=conversation.location)
                        continue
                    detail = f"{num_supervised} in the first {len(cut)} of {len(sample)} tokens"
                    reason = Reason.TOO_FEW_SUPERVISED_TOKENS
                    reject(RejectedRecord(reason, conversation.conversation_id, detail))

    def _refuse_control_tokens(self, messages: Sequence[Message], *, location: str) -> None:
        for index, message in enumerate(messages):
            for text in (message.content, message.reasoning_content):
                if found := self._control.search(text):
                    raise RejectedRecord(
                        Reason.SPECIAL_TOKEN_IN_TEXT, location, f"turn {index} contains {found[0]}"
                    )

    def _rows(self, conversation: Conversation) -> list[Row]:
        if conversation.rendered_text:
            conversation = self._read_back(conversation)
        self._refuse_control_tokens(conversation.messages, location=conversation.conversation_id)
        if self._config.reasoning == "drop":
            answers = tuple(message.without_reasoning() for message in conversation.messages)
            conversation = replace(conversation, messages=answers)
        try:
            turns = find_turns(
                self._template,
                conversation,
                self._closing,
                enable_thinking=self._config.enable_thinking,
            )
        except TemplateRefusedError as error:
            raise RejectedRecord(
                Reason.TEMPLATE_REFUSED, conversation.conversation_id, str(error)
            ) from error
        return plan_rows(turns, last_turn_only=self._config.last_turn_only)

    def _read_back(self, conversation: Conversation) -> Conversation:
        try:
            messages = self._reader.read(conversation.rendered_text)
        except NotOfTemplateError as error:
            raise RejectedRecord(
                Reason.TEXT_NOT_OF_TEMPLATE, conversation.conversation_id, str(error)
            ) from error
        return replace(conversation, messages=messages, rendered_text="")

    def _samples(self, row: Row, encoding: Encoding) -> Iterator[TokenizedSample]:
        """Yield the row with the spans that start at a token boundary, then the others alone."""
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), dtype=np.bool_)
        merged = []
        for start, end in row.spans:
            first = int(np.searchsorted(offsets[:, 0], start))
            if self._is_token_boundary(row.text, start, ids[:first], offsets[:first]):
                last = int(np.searchsorted(offsets[:, 1], end, side="right"))
                mask[first:last] = True
            else:
                merged.append((start, end))
        if mask.any() or not merged:
            yield _sample(ids, mask)
        for start, end in merged:
            context = self._encode(row.text[:start])
            # after an added token, because some tokenizers treat the start of a text specially
            answer = self._encode(self._anchor + row.text[start:end])[bool(self._anchor) :]
            answer_mask = np.arange(len(context) + len(answer)) >= len(context)
            yield _sample(np.concatenate([context, answer]), answer_mask)

    def _is_token_boundary(
        self, text: str, boundary: int, ids: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> bool:
        """Return whether `ids`, which start before `boundary`, are those of `text[:boundary]`.

        Added tokens split the text before the tokenizer's rules apply, so only the text after the
        last of them is compared: the role header, always one of a few strings.
        """
        added = np.flatnonzero(np.isin(ids, self._added_ids))
        last = int(added[-1]) if len(added) else 0
        tail = text[int(offsets[last, 0]) if len(ids) else 0 : boundary]
        return np.array_equal(ids[last:], self._tail_ids(tail))

    def _tail_ids(self, tail: str) -> NDArray[np.int32]:
        if tail not in self._tails:
            if len(self._tails) >= _MAX_CACHED_TAILS:
                self._tails.clear()
            self._tails[tail] = self._encode(tail)
        return self._tails[tail]

    def _encode(self, text: str) -> NDArray[np.int32]:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _render(self, messages: _Messages, *, add_generation_prompt: bool = False) -> str:
        rendering = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        return rendering.text

    def _find_closing(self) -> Closing:
        """Find the text after an answer: the common suffix of two renderings."""
        user = {"role": "user", "content": "a"}
        try:
            one = self._render([user, {"role": "assistant", "content": "x"}])
            two = self._render([user, {"role": "assistant", "content": "y"}])
        except TemplateRefusedError as error:
            raise ConfigError(
                f"the chat template of {self.name} refuses one question and one answer: {error}; "
                "set `chat_template`"
            ) from error
        text = common_end(one, two)
        encoding = self._backend.encode(text, add_special_tokens=False)
        marker_ends = [
            end
            for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._added_ids
        ]
        return Closing(text=text, marker_end=marker_ends[-1] if marker_ends else len(text.rstrip()))

    def _control_tokens(self, added: Iterable[str], always: Iterable[str | None]) -> set[str]:
        """Return the added tokens that the template itself writes, and `always`."""
        turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        try:
            text = self._render(turns, add_generation_prompt=True)
        except TemplateRefusedError:  # it takes no system turn
            text = self._render(turns[1:], add_generation_prompt=True)
        text += self._closing.text
        return {token for token in added if token in text} | {token for token in always if token}


def truncate(sample: TokenizedSample, max_length: int) -> TokenizedSample:
    """Return the first `max_length` tokens, with a new sample id."""
    if len(sample) <= max_length:
        return sample
    return _sample(sample.input_ids[:max_length], sample.loss_mask[:max_length])


def _sample(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> TokenizedSample:
    return TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)


def _exact_offsets(tokenizer: PreTrainedTokenizerBase, name: str) -> Tokenizer:
    """Return a copy of the tokenizer that does not pad, truncate, add tokens or trim offsets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"{name} is a slow tokenizer ({type(tokenizer).__name__}), which reports no offsets; "
            "use a model with a tokenizer.json"
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.post_processor = None
    return copy


def _template(
    tokenizer: PreTrainedTokenizerBase, config: TemplateConfig, name: str
) -> ChatTemplate:
    source = config.chat_template or tokenizer.chat_template
    if source == "plain":
        source = PLAIN_TEMPLATE
    if isinstance(source, Mapping):
        source = source.get("default")
    if not source:
        raise ConfigError(
            f"the tokenizer {name} has no chat template; set `chat_template`, or use the "
            "instruction-tuned model"
        )
    return ChatTemplate(source, variables=tokenizer.special_tokens_map, today=config.date)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _batched(
    conversations: Iterable[Conversation], batch_size: int
) -> Iterator[list[Conversation]]:
    remaining = iter(conversations)
    while batch := list(islice(remaining, batch_size)):
        yield batch
