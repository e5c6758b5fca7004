"""How many samples a store may leave out."""

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
    """Counts samples whose states are not finite; many of them are a fault of the target's.

    They are left out at the end, when they have turned out to be few: else they are tried again.
    """

    def __init__(
        self, target: TargetConfig, config: StoreConfig, tokens: TokensSummary, store: Store
    ) -> None:
        """Count what is left out already.

        Raises:
            CorruptError: that is more than the limit.

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
            CorruptError: there are more than the limit; none of this run's is left out.

        """
        self._new |= {one.sample_id: one for one in exclusions}
        if len(self._before | self._new.keys()) > self._limit:
            raise self._too_many(list(self._new.values()))

    def exclude(self) -> None:
        """Leave out, from now on, what was counted."""
        for one in self._new.values():
            self._store.exclusions.add(one)
            logger.warning("left out: %s", one)

    @property
    def _limit(self) -> int:
        share = Fraction(str(self._config.max_excluded_share))  # 0.07 of 100 is 7
        return math.ceil(share * self._num_samples)

    def _too_many(self, examples: Sequence[Exclusion]) -> CorruptError:
        first = f", first {examples[0]}" if examples else ""
        return CorruptError(
            f"target {self._target.name} gives {len(self._before | self._new.keys()):,} of "
            f"{self._num_samples:,} samples states that are not finite{first}; at most "
            f"{self._limit:,} may be left out (store.max_excluded_share "
            f"{self._config.max_excluded_share:g}). Check the weights, set target.dtype to "
            "float32, or raise that share"
        )
