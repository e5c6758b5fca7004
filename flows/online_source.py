"""The target model itself as the trainer's `SampleSource`: states are computed, used and forgotten.

Samples are grouped and batched exactly as the store's shards would be: training sees the same
bits online and offline.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eagle_core.samples import HiddenStateSample
from eagle_core.target import TargetModel
from eagle_core.tokens import TokenFile
from storage.plan import PlannedSample, plan_shards


def _source_id(target_fingerprint: str, groups: list[tuple[str, ...]]) -> str:
    """Return a digest of the target, the samples and how they are grouped."""
    content = json.dumps([target_fingerprint, groups], separators=(",", ":"))
    return f"online-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


class OnlineSource:
    """Hidden states of `tokens`, computed a group at a time and kept while the group is in use."""

    def __init__(
        self,
        target: TargetModel,
        tokens: TokenFile,
        *,
        group_tokens: int,
        groups_kept: int,
        target_fingerprint: str,
    ) -> None:
        """Plan the groups; nothing is computed yet.

        Args:
            target: the loaded target model.
            tokens: samples to serve.
            group_tokens: tokens that the target computes at a time.
            groups_kept: groups in memory. Fewer than the loader's shuffle window would have every
                group computed many times over.
            target_fingerprint: of the target's states.

        """
        planned = [
            PlannedSample(sample_id=sample_id, num_tokens=int(length))
            for sample_id, length in zip(tokens.sample_ids, tokens.lengths, strict=True)
        ]
        plan = plan_shards(planned, committed=frozenset(), shard_tokens=group_tokens)
        self._target = target
        self._tokens = tokens
        self._groups_kept = groups_kept
        self._members = [shard.sample_ids for shard in plan.shards]
        self._sample_ids = [sample_id for members in self._members for sample_id in members]
        self._computed: OrderedDict[int, dict[str, HiddenStateSample]] = OrderedDict()
        lengths = {sample.sample_id: sample.num_tokens for sample in planned}
        self.source_id = _source_id(target_fingerprint, self._members)
        self.lengths: NDArray[np.int64] = np.array([lengths[sid] for sid in self._sample_ids])
        sizes = [len(members) for members in self._members]
        self.groups: NDArray[np.int64] = np.repeat(np.arange(len(sizes)), sizes)

    def origin(self, sample_id: str) -> str:  # noqa: ARG002 (of the protocol)
        """Return where the states come from."""
        return f"computed by target {self._target.config.name}"

    def prefetch(self, indices: Iterable[int]) -> None:
        """Do nothing: the target and the draft share the device, side by side is no faster."""

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index`, computing its whole group if it is not at hand."""
        return self._group(int(self.groups[index]))[self._sample_ids[index]]

    def _group(self, group: int) -> dict[str, HiddenStateSample]:
        if group not in self._computed:
            samples = self._tokens.by_id(self._members[group])
            states = {sample.sample_id: sample for sample in self._target.capture(samples)}
            self._computed[group] = states
        self._computed.move_to_end(group)
        while len(self._computed) > self._groups_kept:
            self._computed.popitem(last=False)
        return self._computed[group]
