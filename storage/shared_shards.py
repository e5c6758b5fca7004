"""Decoded shards that the processes of one machine share: each is decoded by one of them.

The process that claims a shard decodes it into memory of the system (memfd) and writes a note with
the place of its arrays; the others map the same memory, read-only. A note whose process has ended
or has withdrawn the shard counts as none, and the shard is decoded again. The system frees the
memory when the last process that maps it drops it or ends, killed ones too: nothing is left behind
but small files in the folder.

Each shard takes a few file descriptors. Where the system gives no more of them, or no memory to
share, a process decodes for itself.
"""

import errno
import json
import logging
import math
import mmap
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from storage.encoding.shard import DecodedShard
from storage.objects.buffer_pool import Allocate
from storage.objects.claims import Claims

_OWN_FILES = Path("/proc/self/fd")
_SPARE_DESCRIPTORS = 64
"""That are left for everything else that a process does, reading shards included."""
_OFFSETS, _LAST_OFFSETS = "/offsets", "/last_offsets"
"""Names of the arrays that are not of a sample's fields."""

Decode = Callable[[Allocate], DecodedShard]
"""Decodes a shard with its large arrays in the memory that it is given."""


logger = logging.getLogger(__name__)


class _NotSharedError(Exception):
    """The system gives no more memory to share."""


class SharedShards:
    """The decoded shards of all processes that use one folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Share through `folder`, on a local disk; see `where_possible`."""
        self._folder = folder
        self._claims = Claims(folder=folder / "claims")
        self._own: dict[str, _SharedMemory] = {}
        self._has_warned = False

    @classmethod
    def where_possible(cls, folder: Path) -> Self | None:
        """Return what shares through `folder`, or None on a system that cannot, such as macOS."""
        return cls(folder) if hasattr(os, "memfd_create") and _OWN_FILES.exists() else None

    def get(self, shard_id: str, decode: Decode, *, wait: bool) -> DecodedShard | None:
        """Return a shard that another process has decoded, else decode it for all.

        Without `wait`, return None if another process is decoding it. Errors are those of `decode`:
        a shard that one process could not decode is tried by the next. If the system gives no
        memory to share, the shard is decoded for this process only.
        """
        found = self._find(shard_id)
        if found is not None:
            return found
        with self._claims.claim(shard_id, wait=wait) as is_held:
            if not is_held:
                return None
            found = self._find(shard_id)
            if found is not None:
                return found
            try:
                return self._decode(shard_id, decode)
            except _NotSharedError as error:
                self._warn(error)
            return decode(np.empty)

    def withdraw(self, shard_id: str) -> None:
        """Give a shard to no further process, if this one decoded it; arrays remain valid."""
        memory = self._own.pop(shard_id, None)
        if memory is not None:
            self._note(shard_id).unlink(missing_ok=True)
            memory.close()

    def _decode(self, shard_id: str, decode: Decode) -> DecodedShard:
        memory = _SharedMemory(shard_id)
        try:
            note = memory.hold(decode(memory.empty))
            shard = _mapped(memory.descriptor, note, shard_id)
        except BaseException:
            memory.close()
            raise
        self.withdraw(shard_id)
        self._own[shard_id] = memory
        path = self._note(shard_id)
        partial = path.with_suffix(".partial")
        with suppress(OSError):  # on a full disk the others decode for themselves
            partial.write_text(json.dumps(asdict(note)), encoding="utf-8")
            partial.replace(path)
        return shard

    def _warn(self, error: _NotSharedError) -> None:
        if not self._has_warned:
            logger.warning(
                "the processes of this machine cannot share all decoded shards (%s): each decodes "
                "those for itself, which takes more time and memory. Allow more open files "
                "(ulimit -n), or take smaller training.shuffle_window or training.batch_tokens",
                error,
            )
        self._has_warned = True

    def _find(self, shard_id: str) -> DecodedShard | None:
        try:
            note = _Note(**json.loads(self._note(shard_id).read_text(encoding="utf-8")))
            descriptor = os.open(f"/proc/{note.pid}/fd/{note.descriptor}", os.O_RDONLY)
        except OSError:
            return None
        try:  # the number may be that of another file by now
            is_same = os.fstat(descriptor).st_ino == note.inode
            return _mapped(descriptor, note, shard_id) if is_same else None
        except _NotSharedError:  # decoding will say so
            return None
        finally:
            os.close(descriptor)

    def _note(self, shard_id: str) -> Path:
        return self._folder / f"{shard_id}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Note:
    """Where a process holds the arrays of a shard."""

    pid: int
    descriptor: int
    inode: int
    num_bytes: int
    sample_ids: Sequence[str]
    arrays: Mapping[str, tuple[str, Sequence[int], Sequence[int], int]]
    """Dtype, shape, strides and offset in bytes, by name."""


class _SharedMemory:
    """Memory that other processes can map as long as this one keeps it open."""

    def __init__(self, name: str) -> None:
        with _translated():
            self.descriptor = os.memfd_create(name)
        self._num_bytes = 0
        self._parts: list[tuple[int, int, int]] = []
        """First address, size and offset of each part."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array of undefined values in this memory."""
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return np.empty(shape, dtype)
        offset = self._num_bytes
        self._num_bytes += -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with _translated():
            os.ftruncate(self.descriptor, self._num_bytes)
            _require_spare(self.descriptor)
            part = mmap.mmap(self.descriptor, num_bytes, offset=offset)
        array = np.frombuffer(part, dtype).reshape(shape)
        self._parts.append((_address(array), num_bytes, offset))
        return array

    def hold(self, shard: DecodedShard) -> _Note:
        """Return the place of the shard's arrays, those that are elsewhere copied into here."""
        named = {**shard.arrays, _OFFSETS: shard.offsets, _LAST_OFFSETS: shard.last_offsets}
        places = {name: self._offset(array) for name, array in named.items()}
        others = {name: named[name] for name, offset in places.items() if offset is None}
        copies = self._copied(others)
        arrays = {
            name: (array.dtype.str, array.shape, array.strides, self._offset(array) or 0)
            for name, array in {**named, **copies}.items()
        }
        return _Note(
            pid=os.getpid(),
            descriptor=self.descriptor,
            inode=os.fstat(self.descriptor).st_ino,
            num_bytes=self._num_bytes,
            sample_ids=shard.sample_ids,
            arrays=arrays,
        )

    def close(self) -> None:
        """Let no further process map it."""
        os.close(self.descriptor)

    def _copied(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Return copies in one part of this memory."""
        sizes = [-(-array.nbytes // 64) * 64 for array in arrays.values()]
        part = self.empty((sum(sizes),), np.uint8)
        ends = np.cumsum(sizes).tolist()
        copies = {}
        for (name, array), end, size in zip(arrays.items(), ends, sizes, strict=True):
            here = part[end - size :][: array.nbytes].view(array.dtype).reshape(array.shape)
            here[...] = array
            copies[name] = here
        return copies

    def _offset(self, array: NDArray[Any]) -> int | None:
        """Return where an array begins in this memory, or None if it is elsewhere."""
        address = _address(array)
        for first, num_bytes, offset in self._parts:
            if first <= address < first + num_bytes:
                return offset + address - first
        return None


def _mapped(descriptor: int, note: _Note, shard_id: str) -> DecodedShard:
    """Return a shard whose arrays are views of shared memory, read-only."""
    with _translated():
        _require_spare(descriptor)
        memory = mmap.mmap(descriptor, note.num_bytes, access=mmap.ACCESS_READ)
    arrays = {
        name: np.ndarray(tuple(shape), np.dtype(dtype), memory, offset, tuple(strides))
        for name, (dtype, shape, strides, offset) in note.arrays.items()
    }
    offsets, last_offsets = arrays.pop(_OFFSETS), arrays.pop(_LAST_OFFSETS)
    return DecodedShard(
        shard_id=shard_id,
        sample_ids=tuple(note.sample_ids),
        offsets=offsets,
        arrays=arrays,
        last_offsets=last_offsets,
    )


def _require_spare(newest: int) -> None:
    """Raise OSError if few descriptors are left; `newest`, just opened, was the lowest free one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and newest >= limit - _SPARE_DESCRIPTORS:
        raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}, {limit} are allowed")


@contextmanager
def _translated() -> Iterator[None]:
    """Raise _NotSharedError if the system refuses: other errors of a decoder are its own."""
    try:
        yield
    except OSError as error:
        raise _NotSharedError(str(error)) from error


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
