"""Random access to the samples of a snapshot. Never fills, substitutes or skips data.

A shard's objects are read whole, compared with their committed size and digest, and decoded from
exactly the compared bytes. A few threads do this; `prefetch` starts them. Safe to call from several
threads; a pickled copy in another process starts with an empty cache.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
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
from storage.shared_shards import SharedShards

CACHE_BYTES = 2 << 30
READ_THREADS = 2
MOST_FREE = 4 * READ_THREADS
"""Free buffers kept for reuse: a few for each shard that is being read."""


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
        shared: SharedShards | None = None,
    ) -> None:
        """Cache up to `cache_bytes` of decoded shards, at least one, besides those being read.

        With `shared`, that is what all processes have together if they read about the same shards
        at about the same time.
        """
        self._log = log
        self._identity = identity
        self._snapshot = snapshot
        self._cache_bytes = cache_bytes
        self._object_cache = object_cache
        self._shared = shared
        self._shards: OrderedDict[str, Future[DecodedShard | None]] = OrderedDict()
        """None if another process was decoding it when it was tried."""
        self._lock = threading.Lock()
        self._memory = RecycledMemory(MOST_FREE)
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="shard-reader")

    @property
    def identity(self) -> StoreIdentity:
        """Return the identity of the store: its target, encoding and omitted states."""
        return self._identity

    @property
    def snapshot_id(self) -> str:
        """Return the digest of the samples and their order."""
        return self._snapshot.snapshot_id

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return [N] the number of tokens per sample."""
        return self._snapshot.lengths

    @property
    def groups(self) -> NDArray[np.int64]:
        """Return [N] the shard index per sample, non-decreasing."""
        return self._snapshot.groups

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._snapshot.num_samples

    def shard_of(self, sample_id: str) -> str:
        """Return the id of a sample's shard; KeyError if the snapshot lacks the sample."""
        wanted = np.frombuffer(bytes.fromhex(sample_id), self._snapshot.sample_ids.dtype)
        found = np.flatnonzero(self._snapshot.sample_ids == wanted)
        if not len(found):
            raise KeyError(f"snapshot {self.snapshot_id} has no sample {sample_id}")
        return self._snapshot.shard_ids[int(self.groups[found[0]])]

    def prefetch(self, indices: Iterable[int], others: Iterable[int] = ()) -> None:
        """Start reading the shards of samples that will be fetched soon.

        If processes share shards, they divide those of `others`, which other processes will fetch.
        No read error is raised here. A shard that could not be read is read again by the next
        call that needs it.
        """
        wanted = indices if self._shared is None else chain(indices, others)
        for group in dict.fromkeys(int(self.groups[index]) for index in wanted):
            self._begin(self._snapshot.shard_ids[group])

    def fetch(self, index: int) -> StoredSample:
        """Return sample `index`, read-only; raise CorruptError rather than substitute anything.

        Omitted states are absent: `Recompute.complete` adds them.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside the snapshot of {len(self)} samples")
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
            return reading.result() or self._await_other(shard_id)
        except BaseException:
            with self._lock:  # the next fetch, perhaps after a repair, reads again
                if self._shards.get(shard_id) is reading:
                    del self._shards[shard_id]
            raise

    def _await_other(self, shard_id: str) -> DecodedShard:
        """Return a shard that another process was decoding; decode it if that one failed."""
        shard = self._read(shard_id, wait=True)
        assert shard is not None  # noqa: S101 (only without `wait`)
        with self._lock:
            self._shards[shard_id] = Future()
            self._shards[shard_id].set_result(shard)
        return shard

    def _read(self, shard_id: str, *, wait: bool) -> DecodedShard | None:
        def decode(allocate_states: Allocate) -> DecodedShard:
            return read_shard(
                self._log,
                shard_id,
                identity=self._identity,
                cache=self._object_cache,
                allocate=self._memory.empty,
                allocate_states=allocate_states,
            )

        if self._shared is None:
            return decode(self._memory.empty)
        return self._shared.get(shard_id, decode, wait=wait)

    def _begin(self, shard_id: str) -> Future[DecodedShard | None]:
        with self._lock:
            reading = self._shards.get(shard_id)
            if reading is None or _has_failed(reading):  # perhaps what failed works by now
                reading = self._threads.submit(self._read, shard_id, wait=False)
                self._shards[shard_id] = reading
            self._shards.move_to_end(shard_id)
            self._evict()
            return reading

    def _evict(self) -> None:
        """Evict the least recently used shards, but none that is being read."""
        sizes = {
            shard_id: 0 if shard is None else shard.num_bytes
            for shard_id, reading in self._shards.items()
            if reading.done() and not _has_failed(reading)
            for shard in (reading.result(),)
        }
        total = sum(sizes.values())
        newest = next(reversed(self._shards))
        for shard_id, num_bytes in sizes.items():
            if total <= self._cache_bytes:
                return
            if shard_id != newest:
                del self._shards[shard_id]
                total -= num_bytes
                if self._shared is not None:
                    self._shared.withdraw(shard_id)

    def __getstate__(self) -> Mapping[str, Any]:
        """Pickle without the cache, the lock and what it shares."""
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


def _has_failed(reading: Future[DecodedShard | None]) -> bool:
    return reading.done() and reading.exception() is not None


def read_shard(
    log: CommitLog,
    shard_id: str,
    *,
    identity: StoreIdentity,
    cache: ObjectCache | None = None,
    allocate: Allocate = np.empty,
    allocate_states: Allocate | None = None,
) -> DecodedShard:
    """Return a shard; CorruptError unless every object has its committed size and digest.

    Memory comes from `allocate`, that of the states from `allocate_states` if given.
    """
    try:
        objects = _read_objects(log, shard_id, cache, allocate)
    except ShardMissingError:  # perhaps the cached manifests are out of date
        log.drop_cached()
        objects = _read_objects(log, shard_id, cache, allocate)
    return decode_shard(shard_id, objects, identity=identity, allocate=allocate_states or allocate)


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
