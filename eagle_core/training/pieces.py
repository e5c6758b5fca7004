"""A sample longer than a window is trained on in pieces: no batch is larger than asked for.

At position t of a sample all training-time-test steps read the tokens up to t + 1 + ttt_length, and
as many before t as the draft's attention sees. A piece owns consecutive positions, whose loss
counts in it, and has tokens before and after them that are only read. Each position is owned once,
so each term of the loss of a sample counts once, with the same target as without windows.

Shapes: N samples, P pieces.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eagle_core.errors import ConfigError
from eagle_core.samples import HiddenStateSample, SampleSource
from eagle_core.training.config import WHOLE_SAMPLES, TrainingConfig
from eagle_core.training.packing import PackedBatch, pack

Weights = Callable[[str, NDArray[np.bool_]], NDArray[np.float32]]
"""Returns [T] the factor of each position in the loss, for a sample's id and loss mask [T]."""


class Reach(Protocol):
    """How far a draft sees."""

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a query of a layer sees, itself included; None: all."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers, each of which adds to what the last one sees."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pieces:
    """P pieces of samples, in the order of training."""

    sample: NDArray[np.int64]
    """[P] the sample: its place in the given lengths, or what `of` made of it"""
    start: NDArray[np.int64]
    """[P] first token of the sample that the piece has"""
    own_start: NDArray[np.int64]
    """[P] first position that it owns"""
    own_end: NDArray[np.int64]
    """[P] one past the last position that it owns"""
    end: NDArray[np.int64]
    """[P] one past the last token that it has"""

    def __len__(self) -> int:
        """Return P."""
        return len(self.sample)

    def __getitem__(self, chosen: slice) -> "Pieces":
        """Return the chosen pieces."""
        return Pieces(
            sample=self.sample[chosen],
            start=self.start[chosen],
            own_start=self.own_start[chosen],
            own_end=self.own_end[chosen],
            end=self.end[chosen],
        )

    def of(self, samples: NDArray[np.int64]) -> "Pieces":
        """Return them with the samples [N] named: those of the given lengths."""
        return replace(self, sample=samples[self.sample])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return [P] the number of tokens that each has."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How samples are divided."""

    tokens: int
    """Most tokens of a piece; a sample that is no longer is one piece."""
    before: int
    """Tokens that a piece has before its own positions, if the sample has them."""
    after: int
    """Tokens that it has after its own, up to the sample's end."""

    def __post_init__(self) -> None:
        """Raise ConfigError if a piece would own nothing."""
        if self.stride < 1:
            raise ConfigError(
                f"a window of {self.tokens} tokens is too small: {self.before} tokens before the "
                f"positions that it trains and {self.after} after them leave none; raise "
                "training.window_tokens"
            )

    @classmethod
    def of(cls, config: TrainingConfig, draft: Reach) -> "Windows":
        """Return the windows of a run.

        A draft whose attention is limited sees `sliding_window - 1` tokens back in each layer. If
        the window has room for that in its first half, its pieces begin so many tokens early, and
        the sum of their losses is that of the whole sample. Any other draft gets a quarter of the
        window: context for the first positions of a piece, for a third more work.
        """
        tokens = config.piece_tokens
        before = tokens // 4
        if draft.sliding_window is not None:
            seen = draft.num_hidden_layers * (draft.sliding_window - 1)
            before = seen if seen <= tokens // 2 else before
        return cls(tokens=tokens, before=before, after=config.ttt_length + 1)

    @property
    def stride(self) -> int:
        """Return how many positions a piece owns that is neither first nor last."""
        return self.tokens - self.before - self.after

    def pieces(self, lengths: NDArray[np.int64], first: int = 0) -> Pieces:
        """Return the pieces of samples, one after another.

        A piece depends only on where its own positions begin.

        Args:
            lengths: [N] tokens of the samples.
            first: position where the pieces of the first sample begin.

        """
        own = np.zeros(len(lengths), dtype=np.int64)
        own[:1] = first
        origins = np.maximum(own - self.before, 0)
        more = -(-(lengths - origins - self.tokens) // self.stride)
        counts = 1 + np.maximum(more, 0)
        sample = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = origins[sample] + number * self.stride
        end = np.minimum(start + self.tokens, lengths[sample])
        is_last = end == lengths[sample]
        return Pieces(
            sample=sample,
            start=start,
            own_start=np.where(number == 0, own[sample], start + self.before),
            own_end=np.where(is_last, end, end - self.after),
            end=end,
        )


WHOLE = Windows(tokens=WHOLE_SAMPLES, before=WHOLE_SAMPLES // 2, after=0)
"""No sample is divided."""


class PieceReader:
    """Reads pieces of the samples of a source.

    A sample is fetched once for pieces that follow each other, since that may cost a pass of the
    target; it is let go with its last piece.
    """

    def __init__(self, source: SampleSource) -> None:
        """Read nothing yet."""
        self._source = source
        self._held: tuple[int, HiddenStateSample] | None = None

    def read(
        self, pieces: Pieces, weights_of: Weights | None = None, *, pin_memory: bool = False
    ) -> PackedBatch:
        """Return pieces as one batch.

        Args:
            pieces: with the indices of their samples in the source.
            weights_of: of the positions of a whole sample, if some are to count more than others.
            pin_memory: see `pack`.

        """
        wanted = zip(pieces.sample.tolist(), pieces.end.tolist(), strict=True)
        samples = [self._fetch(index, end) for index, end in wanted]
        return _packed(samples, pieces, weights_of, pin_memory=pin_memory)

    def _fetch(self, index: int, end: int) -> HiddenStateSample:
        """Return a sample, of which the tokens before `end` are asked for."""
        if self._held is not None and self._held[0] == index:
            sample = self._held[1]
        else:
            self._held = None  # before the next one is read
            sample = self._source.fetch(index)
        self._held = (index, sample) if end < len(sample) else None
        return sample


def piece_batches(samples: Iterable[HiddenStateSample], windows: Windows) -> Iterator[PackedBatch]:
    """Yield each piece of `samples` as a batch of its own."""
    for sample in samples:
        pieces = windows.pieces(np.array([len(sample)]))
        for number in range(len(pieces)):
            yield _packed([sample], pieces[number : number + 1])


def _packed(
    samples: Sequence[HiddenStateSample],
    pieces: Pieces,
    weights_of: Weights | None = None,
    *,
    pin_memory: bool = False,
) -> PackedBatch:
    """Return one piece of each of P samples as one batch."""
    rows = list(zip(samples, pieces.start.tolist(), pieces.end.tolist(), strict=True))
    own_starts, own_ends = pieces.own_start - pieces.start, pieces.own_end - pieces.start
    weights = None
    if weights_of is not None:
        weights = np.concatenate(
            [weights_of(one.sample_id, one.loss_mask)[start:end] for one, start, end in rows]
        )
    return pack(
        [sample.part(start, end) for sample, start, end in rows],
        own=list(map(range, own_starts.tolist(), own_ends.tolist())),
        position_weights=weights,
        pin_memory=pin_memory,
    )
