"""The draft vocabulary: the target's tokens that the draft model can propose.

Legend: V target vocabulary, D draft vocabulary. `d2t[k]` is an offset: draft token k is target
token k + d2t[k]. Draft ids are in the order of target ids, so `d2t` never decreases. The choice of
tokens is a pure function of the counts, so it is the same on every machine.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eagle_core.atomic_files import atomic_file
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.samples import TokenizedSample


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCoverage:
    """What one of several sources gave to the counts, and how much of it is covered."""

    num_samples: int
    num_supervised: int
    """Supervised tokens."""
    share: float
    """Share of these that the draft can propose, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Share of the supervised tokens that a draft vocabulary covers."""

    share: float
    """0 to 1"""
    by_source: Mapping[str, SourceCoverage] = field(default_factory=dict)
    """Empty unless there are several sources."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DraftVocabulary:
    """D tokens selected from V."""

    d2t: NDArray[np.int64]
    """[D] target id minus draft id."""
    t2d: NDArray[np.bool_]
    """[V] True where the target token is in the draft vocabulary."""
    source_id: str = ""
    """Fingerprint of the data that was counted; empty if unknown."""

    def __post_init__(self) -> None:
        """Raise `CorruptError` unless both arrays agree."""
        if not np.array_equal(np.flatnonzero(self.t2d), self.target_ids):
            raise CorruptError(
                f"draft vocabulary: d2t ({len(self.d2t)} tokens) and t2d ({int(self.t2d.sum())} of "
                f"{len(self.t2d)}) contradict each other; rebuild it"
            )

    @classmethod
    def build(
        cls,
        counts: NDArray[np.int64],
        *,
        size: int,
        always: Iterable[int] = (),
        source_id: str = "",
    ) -> Self:
        """Select `always`, then the most frequent tokens; if counts tie, the lower id comes first.

        `counts` is [V]. Raises `ConfigError` if `size` exceeds V or is too small for `always`.
        """
        vocab_size = len(counts)
        forced = np.unique(np.fromiter(always, dtype=np.int64))
        if not 0 < size <= vocab_size or len(forced) > size:
            raise ConfigError(
                f"draft vocabulary of {size} tokens: must be 1 to {vocab_size} (the target's) and "
                f"fit the {len(forced)} special tokens; correct `draft_vocab_size`"
            )
        if len(forced) and not 0 <= forced[0] <= forced[-1] < vocab_size:
            raise ConfigError(
                f"draft vocabulary: special token ids {forced[0]} to {forced[-1]} do not fit the "
                f"target's {vocab_size} tokens; the tokenizer does not belong to the target model"
            )
        rank = counts.astype(np.int64, copy=True)
        rank[forced] = np.iinfo(np.int64).max
        chosen = np.sort(np.argsort(-rank, kind="stable")[:size])
        t2d = np.zeros(vocab_size, dtype=np.bool_)
        t2d[chosen] = True
        return cls(d2t=chosen - np.arange(size), t2d=t2d, source_id=source_id)

    @property
    def target_ids(self) -> NDArray[np.int64]:
        """[D] target id of every draft token."""
        ids: NDArray[np.int64] = self.d2t + np.arange(len(self.d2t))
        return ids

    @property
    def fingerprint(self) -> str:
        """sha256 of the chosen ids and V."""
        content = f"{len(self.t2d)} ".encode() + self.target_ids.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()

    def __len__(self) -> int:
        """Return D."""
        return len(self.d2t)

    def coverage(self, counts: NDArray[np.int64]) -> float:
        """Return the share of counted tokens ([V] counts) that the draft can propose."""
        total = int(counts.sum())
        return float(counts[self.t2d].sum() / total) if total else 1.0

    def save(self, path: Path) -> None:
        """Write a safetensors file with `d2t` and `t2d`; it appears only when complete."""
        metadata = {"fingerprint": self.fingerprint, "source_id": self.source_id}
        with atomic_file(path) as partial:
            save_file({"d2t": self.d2t, "t2d": self.t2d}, partial, metadata=metadata)

    @classmethod
    def load(cls, path: Path, *, source_id: str | None = None) -> Self:
        """Load a saved vocabulary and check that it was built from `source_id`, if given.

        Raises `ConfigError` if it is missing, `CorruptError` if damaged, `MismatchError` if it
        belongs to other data.
        """
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                vocabulary = cls(
                    d2t=file.get_tensor("d2t"),
                    t2d=file.get_tensor("t2d"),
                    source_id=metadata.get("source_id", ""),
                )
        except FileNotFoundError as error:
            raise ConfigError(
                f"no draft vocabulary at {path}; resume the run (eyas run train) to build it"
            ) from error
        except (SafetensorError, KeyError) as error:
            raise CorruptError(
                f"{path} is not a draft vocabulary: {error}; delete it and rebuild it"
            ) from error
        if vocabulary.fingerprint != metadata.get("fingerprint"):
            raise CorruptError(
                f"{path} does not have the fingerprint it was saved with; delete it and rebuild it"
            )
        if source_id is not None and source_id != vocabulary.source_id:
            raise MismatchError(
                f"{path} was built from {vocabulary.source_id or 'unnamed data'}, not from "
                f"{source_id}; rebuild it, or train on the data it belongs to"
            )
        return vocabulary


def count_supervised_tokens(
    samples: Iterable[TokenizedSample], vocab_size: int
) -> NDArray[np.int64]:
    """Return [V] counts of supervised tokens. Raise `ConfigError` for an id of V or more."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for sample in samples:
        ids = sample.input_ids[sample.loss_mask]
        if len(ids) and int(ids.max()) >= vocab_size:
            raise ConfigError(
                f"sample {sample.sample_id} has token {int(ids.max())}, but the target model has "
                f"{vocab_size} tokens; the tokenizer does not belong to the target model"
            )
        found, times = np.unique(ids, return_counts=True)
        counts[found] += times
    return counts
