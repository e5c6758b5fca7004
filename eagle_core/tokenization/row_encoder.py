"""Encode rows of text: ids, and a mask for the characters that are supervised.

Invariant: the ids before every supervised token are those that serving has in context. Where the
tokenizer would merge the end of the prompt with the answer, the row is encoded in two pieces, as in
serving.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import TokenRow
from eagle_core.errors import ConfigError
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.tokenization.assistant_turns import Row

_MAX_CACHED_TAILS = 4096


class RowEncoder:
    """Encodes rows with one tokenizer."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        self._added_ids = np.array(sorted(added), dtype=np.int32)
        self._anchor = next((token.content for token in added.values() if token.special), "")
        self._tails: dict[str, NDArray[np.int32]] = {}

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, without any that the tokenizer adds."""
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def samples(self, rows: Sequence[Row]) -> Iterator[list[TokenizedSample]]:
        """Yield the samples of each row: it, and alone the answers that merge with their prompt."""
        texts = [row.text for row in rows]
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            yield list(self._samples(row, encoding))

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
                if last < len(ids) and offsets[last, 0] < end and ids[last] in self._added_ids:
                    last += 1  # a token that takes the white space behind it, too
                mask[first:last] = True
            else:
                merged.append((start, end))
        if mask.any() or not merged:
            yield sample_of(ids, mask)
        for start, end in merged:
            context = self.encode(row.text[:start])
            # after an added token, because some tokenizers treat the start of a text specially
            answer = self.encode(self._anchor + row.text[start:end])[bool(self._anchor) :]
            answer_mask = np.arange(len(context) + len(answer)) >= len(context)
            yield sample_of(np.concatenate([context, answer]), answer_mask)

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
        found = self._tails.get(tail)
        if found is None:  # another thread may clear them meanwhile
            if len(self._tails) >= _MAX_CACHED_TAILS:
                self._tails.clear()
            found = self._tails[tail] = self.encode(tail)
        return found


def exact_backend(tokenizer: PreTrainedTokenizerBase, name: str) -> Tokenizer:
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


def truncate(sample: TokenizedSample, max_length: int) -> TokenizedSample:
    """Return the first `max_length` tokens, with a new sample id."""
    if len(sample) <= max_length:
        return sample
    return sample_of(sample.input_ids[:max_length], sample.loss_mask[:max_length])


def sample_of(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> TokenizedSample:
    """Return the sample with these ids and this mask, named by them."""
    return TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)


def given_sample(tokens: TokenRow) -> TokenizedSample:
    """Return the sample of a record that is token ids already."""
    return sample_of(np.array(tokens.input_ids, np.int32), np.array(tokens.loss_mask, np.bool_))
