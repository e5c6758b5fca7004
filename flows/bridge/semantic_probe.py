"""The semantic probe: recorded when a shard is computed, and checked before training.

The commit record of a shard holds the target's log-probabilities at a few supervised tokens. Stored
states that do not reproduce them are never trained on.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from eagle_core.samples import HiddenStateSample, TokenizedSample
from storage.errors import ShardCorruptError
from storage.maintenance.verify import verify_shard
from storage.probe import omitted_channels, probe_positions
from storage.recompute import Recompute
from storage.records.probe_point import ProbePoint
from storage.records.snapshot import Snapshot
from storage.store import Store

SHARDS_AT_TRAIN_START = 4
logger = logging.getLogger(__name__)


def probe_points(
    states: Iterable[HiddenStateSample],
    samples: Sequence[TokenizedSample],
    *,
    shard_id: str,
    omitted: bool,
) -> Sequence[ProbePoint]:
    """Return the target's argmax and its log-probability at a few supervised tokens of a shard.

    With `omitted`, for a store that omits states, points hold some channels of these states.
    """
    wanted: dict[str, list[int]] = {}
    masks = {sample.sample_id: sample.loss_mask for sample in samples}
    for sample_id, position in probe_positions(shard_id, masks):
        wanted.setdefault(sample_id, []).append(position)
    return [
        point
        for state in states
        if state.sample_id in wanted
        for point in _points(state, wanted[state.sample_id], omitted=omitted)
    ]


def _points(
    state: HiddenStateSample, positions: Sequence[int], *, omitted: bool
) -> Iterator[ProbePoint]:
    assert state.argmax_logprob is not None  # noqa: S101 (states of a capture have it)
    for position in positions:
        yield ProbePoint(
            sample_id=state.sample_id,
            position=position,
            argmax=int(state.target_argmax[position]),
            logprob=float(state.argmax_logprob[position]),
            omitted=omitted_channels(state.aux_hidden_states, state.last_hidden_state, position)
            if omitted
            else (),
        )


def require_sound(store: Store, snapshot: Snapshot, recompute: Recompute) -> int:
    """Raise ShardCorruptError unless a few shards reproduce the recorded log-probabilities.

    Reads the first and the last shard of `snapshot` and some between, the same ones every time;
    returns how many of them carry a probe. Warns if states recomputed on this machine differ in
    their last bits.
    """
    num_shards = len(snapshot.shard_ids)
    places = np.linspace(0, num_shards - 1, min(num_shards, SHARDS_AT_TRAIN_START)).astype(int)
    chosen = [snapshot.shard_ids[place] for place in places]
    for shard_id in chosen:
        findings = verify_shard(store, shard_id, recompute=recompute)
        if findings:
            raise ShardCorruptError(
                f"shard {shard_id} must not be trained on: {findings[0]}. `eyas run "
                "verify RECIPE` checks every shard"
            )
    if store.identity.omitted is not None and any(
        verify_shard(store, shard_id, recompute=recompute, exact=True) for shard_id in chosen
    ):
        logger.warning(
            "states recomputed here differ in their last bits from the generated ones (other "
            "hardware, threads or versions): training is sound, but not bit-identical to training "
            "there"
        )
    return sum(bool(store.commit(shard_id).probe) for shard_id in chosen)
