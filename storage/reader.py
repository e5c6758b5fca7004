"""Random access to the samples of a snapshot. Never fills, never substitutes, never skips.

A shard's objects are read whole, compared with the size and digest they were committed with, and
decoded from exactly the bytes that were compared, by a few threads that `prefetch` sets to work.
Safe to call from several threads; a copy that went to another process by pickling starts with an
empty cache.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encoding.shard import DecodedShard, decode_shard
from storage.errors import REPAIR, ShardCorruptError, ShardMissingError
from storage.objects.buffer_pool import Allocate, RecycledMemory
from storage.objects.digests import ObjectDigest
from storage.objects.object_cache import ObjectCache
from storage.objects.object_store import ObjectStore
from storage.records import keys
from storage.records.commit_log import CommitLog
from storage.records.identity import StoreIdentity
from storage.records.snapshot import Snapshot
from storage.samples import StoredSample

CACHE_BYTES = 2 << 30
READ_THREADS = 2
MOST_FREE = 4 * READ_THREADS
"""Pieces of memory kept for the next shards: a few for each that is being read."""


class SnapshotReader:
    """Samples of one snapshot, by index."""

    def __init__(
        self,
        *,
        log: CommitLog,
        identity: StoreIdentity,
        snapshot: Snapshot,
        cache_bytes: int = CACHE_BYTES,
        object_cache: ObjectCache | None = None,
    ) -> None:
        """Keep at most `cache_bytes` of decoded shards in memory, but one, and those being read."""
        self._log = log
        self._identity = identity
        self._snapshot = snapshot
        self._cache_bytes = cache_bytes
        self._object_cache = object_cache
        self._shards: OrderedDict[str, Future[DecodedShard]] = OrderedDict()
        self._lock = threading.Lock()
        self._memory = RecycledMemory(MOST_FREE)
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="shard-reader")

    @property
    def identity(self) -> StoreIdentity:
        """Return what the store holds states of, and which of them it leaves out."""
        return self._identity

    @property
    def snapshot_id(self) -> str:
        """Return the digest of the samples and their order."""
        return self._snapshot.snapshot_id

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return [N] tokens of each sample."""
        return self._snapshot.lengths

    @property
    def groups(self) -> NDArray[np.int64]:
        """Return [N] non-decreasing shard index of each sample."""
        return self._snapshot.groups

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._snapshot.num_samples

    def shard_of(self, sample_id: str) -> str:
        """Return the shard that serves a sample; KeyError if the snapshot lacks it."""
        wanted = np.frombuffer(bytes.fromhex(sample_id), self._snapshot.sample_ids.dtype)
        found = np.flatnonzero(self._snapshot.sample_ids == wanted)
        if not len(found):
            raise KeyError(f"snapshot {self.snapshot_id} has no sample {sample_id}")
        return self._snapshot.shard_ids[int(self.groups[found[0]])]

    def prefetch(self, indices: Iterable[int]) -> None:
        """Begin to read the shards of these samples, which are fetched soon.

        What goes wrong is raised when a sample of that shard is fetched.
        """
        for group in dict.fromkeys(int(self.groups[index]) for index in indices):
            self._begin(self._snapshot.shard_ids[group])

    def fetch(self, index: int) -> StoredSample:
        """Return sample `index`, read-only; raise CorruptError rather than substitute anything.

        States that the store leaves out are left out: `Recompute.complete` adds them.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a snapshot of {len(self)}")
        shard = self._shard(self._snapshot.shard_ids[self.groups[index]])
        position = int(self._snapshot.positions[index])
        expected = self._snapshot.sample_id(index)
        found = shard.sample_ids[position] if position < len(shard.sample_ids) else None
        if found != expected:
            raise ShardCorruptError(
                f"shard {shard.shard_id}: position {position} holds sample {found}, snapshot "
                f"{self.snapshot_id} expects {expected}; {REPAIR}"
            )
        return shard.sample(position)

    def _shard(self, shard_id: str) -> DecodedShard:
        reading = self._begin(shard_id)
        try:
            return reading.result()
        except BaseException:
            with self._lock:  # whoever asks again, after a repair perhaps, reads again
                if self._shards.get(shard_id) is reading:
                    del self._shards[shard_id]
            raise

    def _begin(self, shard_id: str) -> Future[DecodedShard]:
        with self._lock:
            reading = self._shards.get(shard_id)
            if reading is None:
                reading = self._threads.submit(
                    read_shard,
                    self._log,
                    shard_id,
                    identity=self._identity,
                    cache=self._object_cache,
                    allocate=self._memory.empty,
                )
                self._shards[shard_id] = reading
            self._shards.move_to_end(shard_id)
            self._evict()
            return reading

    def _evict(self) -> None:
        """Let go of the shards that were used least recently; of those being read, none."""
        sizes = {
            shard_id: reading.result().num_bytes
            for shard_id, reading in self._shards.items()
            if reading.done() and not reading.exception()
        }
        total = sum(sizes.values())
        newest = next(reversed(self._shards))
        for shard_id, num_bytes in sizes.items():
            if total <= self._cache_bytes:
                return
            if shard_id != newest:
                del self._shards[shard_id]
                total -= num_bytes

    def __getstate__(self) -> Mapping[str, Any]:
        """Leave the cache and the lock behind."""
        return {
            "log": self._log,
            "identity": self._identity,
            "snapshot": self._snapshot,
            "cache_bytes": self._cache_bytes,
            "object_cache": self._object_cache,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Start with an empty cache."""
        self.__init__(**state)  # type: ignore[misc]


def read_shard(
    log: CommitLog,
    shard_id: str,
    *,
    identity: StoreIdentity,
    cache: ObjectCache | None = None,
    allocate: Allocate = np.empty,
) -> DecodedShard:
    """Return a shard whose every object has its committed size and digest; raise CorruptError."""
    try:
        objects = _read_objects(log, shard_id, cache, allocate)
    except ShardMissingError:  # by what was read of manifests long ago, perhaps
        log.forget()
        objects = _read_objects(log, shard_id, cache, allocate)
    return decode_shard(shard_id, objects, identity=identity, allocate=allocate)


def _read_objects(
    log: CommitLog, shard_id: str, cache: ObjectCache | None, allocate: Allocate
) -> Mapping[str, bytes | memoryview]:
    return {
        key: _read_object(log.root, shard_id, key, expected, cache, allocate)
        for key, expected in log.objects(shard_id).items()
    }


def _read_object(
    root: ObjectStore,
    shard_id: str,
    key: str,
    expected: ObjectDigest,
    cache: ObjectCache | None,
    allocate: Allocate,
) -> bytes | memoryview:
    where = f"shard {shard_id}: {key}"
    path = keys.shard_object(shard_id, key)
    try:
        if cache is None:
            data = root.read_large(path, num_bytes=expected.num_bytes, allocate=allocate)
        else:
            data = cache.fetch(
                expected, lambda: bytes(root.read_large(path, num_bytes=expected.num_bytes))
            )
    except FileNotFoundError as error:
        raise ShardMissingError(f"{where} is missing, committed {expected}; {REPAIR}") from error
    found = ObjectDigest.of(data)
    if found != expected:
        raise ShardCorruptError(f"{where} has {found}, committed {expected}; {REPAIR}")
    return data
