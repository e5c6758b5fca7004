"""The batches over which the sums of a closed-form start run: the first of a run's first epoch.

They are kept in memory up to a limit and read again for each pass beyond it. Training reads them
first, so what a cache holds of them is used twice.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from eagle_core.machine_memory import memory_bytes
from eagle_core.samples import SampleSource
from eagle_core.training.config import TrainingConfig
from eagle_core.training.distributed import Processes
from eagle_core.training.loader import batch_borders, epoch_order
from eagle_core.training.packing import PackedBatch
from eagle_core.training.pieces import PieceReader, Windows

_MOST_KEPT_BYTES = 8 << 30
_SHARE_OF_MEMORY = 0.25
_BATCH_TOKENS = 4096


class SampledBatches:
    """This process's share of the first `num_tokens` tokens of the first epoch."""

    def __init__(
        self,
        source: SampleSource,
        config: TrainingConfig,
        windows: Windows,
        processes: Processes,
        *,
        num_tokens: int,
        refetch: bool = True,
    ) -> None:
        """Choose the samples; none is read yet.

        Args:
            source: the training samples.
            config: its seed and shuffle window give the order.
            windows: how samples are divided.
            processes: every process takes another share.
            num_tokens: about how many tokens to read; all of the epoch if it has fewer.
            refetch: whether batches beyond `kept_bytes` may be read once per pass. If not, the
                sample ends with the last batch that is kept.

        """
        self._source, self._refetch = source, refetch
        self._reader = PieceReader(source)
        order = epoch_order(source.groups, seed=config.seed, epoch=0, window=config.shuffle_window)
        lengths = source.lengths[order]
        sampled = order[: int(np.searchsorted(np.cumsum(lengths), num_tokens)) + 1]
        pieces = windows.pieces(source.lengths[sampled]).of(sampled)
        borders = batch_borders(pieces.sizes, _BATCH_TOKENS)
        members = [pieces[first:end] for first, end in pairwise(borders)]
        self._members = members[processes.rank :: processes.world_size]
        self._planned_tokens = int(source.lengths[sampled].sum())
        self.kept_bytes = min(_MOST_KEPT_BYTES, int(memory_bytes() * _SHARE_OF_MEMORY))
        self.kept_bytes //= processes.world_size
        """Bytes of packed batches that this process keeps in memory."""
        self._kept: list[PackedBatch] = []
        self._num_bytes = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample, over all processes; without `refetch` those that are kept."""
        if self._refetch:
            return self._planned_tokens
        return sum(batch.num_own_tokens for batch in self._kept)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield the batches, on the CPU, in the same order each time."""
        yield from self._kept
        while len(self._kept) < len(self._members) and self._num_bytes < self.kept_bytes:
            batch = self._read(len(self._kept))
            self._kept.append(batch)
            self._num_bytes += batch.aux_hidden_states.nbytes + batch.last_hidden_state.nbytes
            yield batch
        if self._refetch:
            yield from map(self._read, range(len(self._kept), len(self._members)))

    def first(self, num_tokens: int) -> Sequence[PackedBatch]:
        """Return the first batches, of about `num_tokens` tokens."""
        found: list[PackedBatch] = []
        for batch in self:
            found.append(batch)
            if sum(one.num_own_tokens for one in found) >= num_tokens:
                break
        return found

    def _read(self, number: int) -> PackedBatch:
        for members in self._members[number : number + 2]:  # the next one meanwhile
            self._source.prefetch(members.sample.tolist())
        return self._reader.read(self._members[number])
