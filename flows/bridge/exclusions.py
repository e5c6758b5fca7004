"""The limit on the samples that a store may exclude."""

import logging
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from eagle_core.errors import CorruptError
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from flows.config.store import StoreConfig
from flows.summaries import TokensSummary
from storage.records.exclusions import Exclusion
from storage.store import Store

logger = logging.getLogger(__name__)


class ExclusionLimit:
    """Counts samples with non-finite states; many of them indicate a fault of the target.

    They are excluded at the end, if they are few; otherwise the next run tries them again.
    """

    def __init__(
        self, target: TargetConfig, config: StoreConfig, tokens: TokensSummary, store: Store
    ) -> None:
        """Count the samples that are already excluded.

        Raises:
            CorruptError: they exceed the limit.

        """
        self._target, self._config = target, config
        self._store = store
        self._num_samples = tokens.num_samples
        files = [TokenFile(path) for path in (tokens.train_path, tokens.held_out_path)]
        self._before = {
            name for name in store.exclusions.sample_ids() if any(name in file for file in files)
        }
        self._new: dict[str, Exclusion] = {}
        if len(self._before) > self._limit:
            known = [one for one in store.exclusions.read() if one.sample_id in self._before]
            raise self._too_many(known)

    def add(self, exclusions: Iterable[Exclusion]) -> None:
        """Count more samples.

        Raises:
            CorruptError: they exceed the limit; no sample of this run is excluded.

        """
        self._new |= {one.sample_id: one for one in exclusions}
        if len(self._before | self._new.keys()) > self._limit:
            raise self._too_many(list(self._new.values()))

    def exclude(self) -> None:
        """Exclude the counted samples from now on."""
        for one in self._new.values():
            self._store.exclusions.add(one)
            logger.warning("excluded: %s", one)

    @property
    def _limit(self) -> int:
        share = Fraction(str(self._config.max_excluded_share))  # 0.07 of 100 is 7
        return math.ceil(share * self._num_samples)

    def _too_many(self, examples: Sequence[Exclusion]) -> CorruptError:
        first = f", first {examples[0]}" if examples else ""
        return CorruptError(
            f"target {self._target.name} computes non-finite states for "
            f"{len(self._before | self._new.keys()):,} of {self._num_samples:,} samples{first}; at "
            f"most {self._limit:,} may be excluded (store.max_excluded_share "
            f"{self._config.max_excluded_share:g}). Check the weights, set target.dtype to "
            "float32, or raise that share"
        )
