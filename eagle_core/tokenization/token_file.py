"""Tokenised samples on disk: an Arrow file that is memory-mapped, never loaded whole.

The file appears only when complete. Its name identifies its inputs (data set, tokenizer, template,
length limit), so a stale one is never read.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eagle_core.atomic_files import atomic_file
from eagle_core.data.source_record import source_of
from eagle_core.errors import CorruptError
from eagle_core.samples import TokenizedSample

_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.uint8())),
        ("location", pa.string()),
    ]
)
_SOURCES = b"eyas.sources"
"""Key of the sources in the file's metadata, as a JSON object."""
_ROWS_PER_BATCH = 256
_BYTES_PER_BATCH = 128 << 20


class TokenFile:
    """Random access to the tokenised samples of one split, in file order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise CorruptError(
                f"{path} is not a complete token file; delete it and run again"
            ) from error
        self.sample_ids: list[str] = self._table["sample_id"].to_pylist()
        # Files of earlier versions lack this column.
        self._locations = (
            self._table["location"] if "location" in self._table.schema.names else None
        )
        metadata = self._table.schema.metadata or {}
        self.sources: Mapping[str, int] = json.loads(metadata.get(_SOURCES, b"{}"))
        """Conversations that each of the data set's sources gave to the split, in their order;
        empty if it has one, or if it is not recorded."""
        self._rows = {sample_id: row for row, sample_id in enumerate(self.sample_ids)}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.sample_ids)

    def __contains__(self, sample_id: str) -> bool:
        """Return whether the file contains this sample."""
        return sample_id in self._rows

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] number of tokens per sample."""
        lengths: NDArray[np.int64] = pc.list_value_length(self._table["input_ids"]).to_numpy()
        return lengths

    @property
    def supervised_lengths(self) -> NDArray[np.int64]:
        """[N] number of supervised tokens per sample."""
        counts = [_sums(chunk) for chunk in self._table["loss_mask"].chunks]
        return np.concatenate([np.zeros(0, dtype=np.int64), *counts])

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        return int(self.supervised_lengths.sum())

    def rows_by_source(self) -> dict[str, NDArray[np.int64]]:
        """Return the rows of the samples of each source; empty unless there are several."""
        if self._locations is None or not self.sources:
            return {}
        names = np.array([source_of(location) for location in self._locations.to_pylist()])
        return {name: np.flatnonzero(names == name) for name in self.sources}

    def fetch(self, row: int) -> TokenizedSample:
        """Return the sample in `row`."""
        ids = self._table["input_ids"][row].values.to_numpy()
        mask = self._table["loss_mask"][row].values.to_numpy()
        return TokenizedSample(
            sample_id=self.sample_ids[row],
            input_ids=ids,
            loss_mask=mask.astype(np.bool_),
            location="" if self._locations is None else self._locations[row].as_py(),
        )

    def by_id(self, sample_ids: Sequence[str]) -> list[TokenizedSample]:
        """Return the named samples in the given order."""
        return [self.fetch(self._rows[sample_id]) for sample_id in sample_ids]

    def __iter__(self) -> Iterator[TokenizedSample]:
        """Yield every sample in file order."""
        return (self.fetch(row) for row in range(len(self)))


def write_token_file(
    path: Path,
    samples: Iterable[TokenizedSample],
    *,
    without: Collection[str] = (),
    sources: Mapping[str, int] | None = None,
) -> TokenFile:
    """Write `samples`, each sample id once, and return the opened file. Constant memory.

    Samples with an id in `without` are skipped: held-out samples must not be trained on. `sources`
    are the names of several sources, of which each location begins with one, and how many
    conversations of the split each gave.
    """
    metadata = {_SOURCES: json.dumps(dict(sources))} if sources else None
    schema = _SCHEMA.with_metadata(metadata)
    with atomic_file(path) as partial, pa.ipc.new_file(str(partial), schema) as writer:
        for rows in _batched(_unique(samples, without)):
            writer.write_batch(_record_batch(rows))
    return TokenFile(path)


def _unique(
    samples: Iterable[TokenizedSample], without: Collection[str]
) -> Iterator[TokenizedSample]:
    """Drop samples with the same tokens and mask: different texts can be equal once truncated."""
    seen = set(without)
    for sample in samples:
        if sample.sample_id not in seen:
            seen.add(sample.sample_id)
            yield sample


def _batched(samples: Iterable[TokenizedSample]) -> Iterator[list[TokenizedSample]]:
    rows: list[TokenizedSample] = []
    num_bytes = 0
    for sample in samples:
        rows.append(sample)
        num_bytes += sample.input_ids.nbytes + sample.loss_mask.nbytes
        if len(rows) == _ROWS_PER_BATCH or num_bytes >= _BYTES_PER_BATCH:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows


def _sums(masks: pa.LargeListArray) -> NDArray[np.int64]:
    """Return the number of ones in each of the lists."""
    offsets = masks.offsets.to_numpy()
    ones = np.concatenate([[0], np.cumsum(masks.values.to_numpy()[: offsets[-1]], dtype=np.int64)])
    sums: NDArray[np.int64] = ones[offsets[1:]] - ones[offsets[:-1]]
    return sums


def _record_batch(rows: Sequence[TokenizedSample]) -> pa.RecordBatch:
    return pa.record_batch(
        [
            pa.array([sample.sample_id for sample in rows]),
            pa.array([sample.input_ids for sample in rows], type=_SCHEMA.field("input_ids").type),
            pa.array(
                [sample.loss_mask.astype(np.uint8) for sample in rows],
                type=_SCHEMA.field("loss_mask").type,
            ),
            pa.array([sample.location for sample in rows]),
        ],
        schema=_SCHEMA,
    )
