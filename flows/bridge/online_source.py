"""The target model as the trainer's `SampleSource`: states are computed, used and discarded.

Samples are grouped and batched exactly as the store's shards would be: training sees the same bits
online and offline. With a keeper, the states are stored, and read from the store the next time;
order and grouping do not depend on what the store holds.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eagle_core.samples import HiddenStateSample
from eagle_core.target.capture import CapturingTarget, capture_states
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.keep_online_states import StateKeeper
from storage.records.plan import PlannedSample, plan_shards


def _source_id(target_fingerprint: str, groups: list[tuple[str, ...]]) -> str:
    """Return a digest of the target, the samples and how they are grouped."""
    content = json.dumps([target_fingerprint, groups], separators=(",", ":"))
    return f"online-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


class OnlineSource:
    """Hidden states of `tokens`, computed one group at a time and kept while it is in use."""

    def __init__(
        self,
        load_target: Callable[[], CapturingTarget],
        tokens: TokenFile,
        *,
        group_tokens: int,
        groups_kept: int,
        target_fingerprint: str,
        keeper: StateKeeper | None = None,
    ) -> None:
        """Plan the groups; nothing is computed yet.

        Args:
            load_target: returns the target model; called once, before the first computation.
            tokens: samples to serve.
            group_tokens: tokens per group; the target computes one group at a time.
            groups_kept: groups in memory. With fewer than the loader's shuffle window, every group
                is computed many times.
            target_fingerprint: fingerprint of the target's states.
            keeper: stores the computed states; by default they are discarded.

        """
        planned = [
            PlannedSample(sample_id=sample_id, num_tokens=int(length))
            for sample_id, length in zip(tokens.sample_ids, tokens.lengths, strict=True)
        ]
        plan = plan_shards(planned, committed=frozenset(), shard_tokens=group_tokens)
        self._load_target = load_target
        self._target: CapturingTarget | None = None
        self._keeper = keeper
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
        if keeper is not None:
            by_id = {sample.sample_id: sample for sample in planned}
            keeper.plan([by_id[name] for name in members] for members in self._members)

    def origin(self, sample_id: str) -> str:  # noqa: ARG002 (of the protocol)
        """Return where the states come from."""
        return "computed by the target"

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:  # noqa: ARG002 (of the protocol)
        """Start reading the stored samples.

        Nothing is computed ahead: target and draft share the device, so overlap is no faster.
        """
        if self._keeper is not None:
            self._keeper.prefetch(self._sample_ids[index] for index in indices)

    def fetch(self, index: int) -> HiddenStateSample:
        """Return sample `index`, computing its whole group unless it is in memory or stored."""
        sample_id, group = self._sample_ids[index], int(self.groups[index])
        if sample_id in self._computed.get(group, {}):
            self._computed.move_to_end(group)
        elif self._keeper is not None and self._keeper.holds(sample_id):
            return self._keeper.fetch(sample_id)
        else:
            self._computed[group] = self._compute(self._members[group])
            while len(self._computed) > self._groups_kept:
                self._computed.popitem(last=False)
        return self._computed[group][sample_id]

    def target(self) -> CapturingTarget:
        """Return the target, loaded if it is not yet."""
        if self._target is None:
            self._target = self._load_target()
        return self._target

    def release_target(self) -> None:
        """Release the target and the states in memory; the next computation reloads the target."""
        self._target = None
        self._computed.clear()

    def _compute(self, members: Sequence[str]) -> dict[str, HiddenStateSample]:
        """Return the states of a group, except those that are already stored."""
        if self._keeper is None:
            states = capture_states(self.target(), self._tokens.by_id(members))
        else:
            missing = [name for name in members if not self._keeper.holds(name)]
            for_recompute = self._keeper.store.identity.omitted is not None
            capture = partial(capture_states, self.target(), for_recompute=for_recompute)
            states = iter(self._keeper.compute(self._tokens.by_id(missing), capture))
        return {sample.sample_id: sample for sample in states}
