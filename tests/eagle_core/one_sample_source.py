"""A sample source of one sample held in memory."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eagle_core.samples import HiddenStateSample


class OneSampleSource:
    """Serves the sample it was given."""

    def __init__(self, sample: HiddenStateSample) -> None:
        self._sample = sample

    @property
    def source_id(self) -> str:
        """The sample's own id."""
        return self._sample.sample_id

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[1]"""
        return np.array([len(self._sample)])

    @property
    def groups(self) -> NDArray[np.int64]:
        """[1]"""
        return np.zeros(1, dtype=np.int64)

    def origin(self, sample_id: str) -> str:
        return f"memory, as {sample_id[:8]}"

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
        """Do nothing: all is in memory."""

    def fetch(self, index: int) -> HiddenStateSample:
        """Return the sample."""
        assert index == 0
        return self._sample
