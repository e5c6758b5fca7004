"""How much memory the decoded shards of a training run may take."""

import logging

from eagle_core.machine_memory import memory_bytes
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import windows_in_use
from eagle_core.training.pieces import WHOLE
from eagle_core.training.schedule import step_shape
from storage.records.snapshot import Snapshot

logger = logging.getLogger(__name__)

SHARE_OF_MEMORY = 1 / 3
"""That decoded shards take at most: batches, weights and what the system caches need the rest."""


def decoded_bytes(
    training: TrainingConfig, snapshot: Snapshot, *, shard_bytes: int, is_shared: bool
) -> int:
    """Return the bytes of decoded shards to hold, by one process or by all that share them.

    Samples are shuffled inside a window of shards: with less memory, a shard is decoded more than
    once. No rank drops a shard that another one still has to map. One window is always held. Warns
    if the machine's memory is too small for more.

    Args:
        training: its steps decide which shards are used at a time.
        snapshot: the samples to train on.
        shard_bytes: of the largest shard, decoded.
        is_shared: whether the processes of the machine have one copy of a shard.

    """
    windows = _windows_in_use(training, snapshot) if is_shared else 1
    num_shards = min(windows * training.shuffle_window, len(snapshot.shard_ids))
    wanted = num_shards * shard_bytes
    num_copies = 1 if is_shared else training.num_processes
    window = min(training.shuffle_window, len(snapshot.shard_ids)) * shard_bytes
    # A window that is not held whole is decoded again for each batch.
    most = max(int(memory_bytes() * SHARE_OF_MEMORY) // num_copies, window)
    if wanted > most:
        logger.warning(
            "the decoded shards that training uses at a time have %.1f GB, and the larger of one "
            "window and a third of this machine's memory is %.1f GB%s: no more is held, so that "
            "shards are decoded more than "
            "once per epoch and training may wait for them. More memory helps; so do a smaller "
            "training.shuffle_window or training.batch_tokens in a new run, and smaller shards "
            "(store.shard_tokens) in a new store",
            *(wanted / 1e9, most * num_copies / 1e9),
            "" if num_copies == 1 else f", for {num_copies} processes that cannot share them",
        )
    return min(wanted, most)


def _windows_in_use(training: TrainingConfig, snapshot: Snapshot) -> int:
    shape = step_shape(training, WHOLE, world_size=training.world_size)  # pieces use no more
    num_tokens, num_shards = int(snapshot.lengths.sum()), len(snapshot.shard_ids)
    return windows_in_use(shape, tokens=num_tokens, num_groups=num_shards)
