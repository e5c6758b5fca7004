"""Which samples a store leaves out, and how many it may."""

import logging
import math
from collections.abc import Iterable, Sequence

from eagle_core.errors import CorruptError
from eagle_core.target_config import TargetConfig
from eagle_core.tokens import TokenFile
from flows.config import StoreConfig
from flows.summaries import TokensSummary
from storage.exclusions import Exclusion
from storage.store import Store

logger = logging.getLogger(__name__)


def excluded_samples(store: Store, tokens: TokensSummary) -> Sequence[str]:
    """Return the samples of both splits that the store leaves out."""
    excluded = store.exclusions.sample_ids()
    if not excluded:
        return ()
    files = [TokenFile(path) for path in (tokens.train_path, tokens.held_out_path)]
    return sorted(name for name in excluded if any(name in file for file in files))


class ExclusionLimit:
    """Leaves samples out while there are few of them: many are a fault of the target's."""

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
        self._left_out = set(excluded_samples(store, tokens))
        if len(self._left_out) > self._limit:
            known = [one for one in store.exclusions.read() if one.sample_id in self._left_out]
            raise self._too_many(known)

    def add(self, exclusions: Iterable[Exclusion]) -> None:
        """Leave more samples out.

        Raises:
            CorruptError: these would be more than the limit; they are not left out.

        """
        new = {one.sample_id: one for one in exclusions if one.sample_id not in self._left_out}
        self._left_out |= new.keys()
        if len(self._left_out) > self._limit:
            raise self._too_many(list(new.values()))
        for one in new.values():
            self._store.exclusions.add(one)
            logger.warning("left out, %s", one)

    @property
    def _limit(self) -> int:
        return math.ceil(self._config.max_excluded_share * self._num_samples)

    def _too_many(self, examples: Sequence[Exclusion]) -> CorruptError:
        first = f", first {examples[0]}" if examples else ""
        return CorruptError(
            f"target {self._target.name} gives {len(self._left_out):,} of {self._num_samples:,} "
            f"samples states that are not finite{first}; at most {self._limit:,} may be left out "
            f"(store.max_excluded_share {self._config.max_excluded_share:g}). Check the weights, "
            "set target.dtype to float32, or raise that share"
        )
