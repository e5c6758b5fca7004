"""Tokenised samples on disk: an Arrow file that is memory-mapped, never loaded whole.

The file appears only when complete. Its name identifies its inputs (data set, tokenizer, template,
length limit), so a stale one is never read.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eagle_core.atomic_files import atomic_file
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
_ROWS_PER_BATCH = 256


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
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        masks = self._table["loss_mask"].combine_chunks()
        return int(np.count_nonzero(masks.flatten().to_numpy()))

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
    path: Path, samples: Iterable[TokenizedSample], *, without: Collection[str] = ()
) -> TokenFile:
    """Write `samples`, each sample id once, and return the opened file. Constant memory.

    Samples with an id in `without` are skipped: held-out samples must not be trained on.
    """
    with atomic_file(path) as partial, pa.ipc.new_file(str(partial), _SCHEMA) as writer:
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
    for sample in samples:
        rows.append(sample)
        if len(rows) == _ROWS_PER_BATCH:
            yield rows
            rows = []
    if rows:
        yield rows


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
