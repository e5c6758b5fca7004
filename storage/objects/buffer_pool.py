"""Memory that dead arrays leave to the next ones.

The first touch of fresh memory takes the system about as long as copying into it. A reader replaces
shards of about equal size all the time, so it can do without.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Allocate = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]
"""Returns an array of a shape and a dtype whose values are undefined, like `numpy.empty`."""

SMALLEST = 1 << 20
"""Bytes below which the C library reuses memory well enough itself."""
STEPS_PER_DOUBLING = 8


class RecycledMemory:
    """Allocates like `numpy.empty`, from the memory of arrays that nobody refers to any more.

    Views keep an array's memory, as usual. Safe to use from several threads.
    """

    def __init__(self, most_free: int) -> None:
        """Keep at most `most_free` pieces of memory that are not in use."""
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=most_free)
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array of undefined values."""
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < SMALLEST:
            return np.empty(shape, dtype)
        memory = self._take(_rounded(num_bytes))
        # Of an array, views would refer to `memory`; of a memoryview they refer to this array.
        array = np.frombuffer(memory.data, dtype, math.prod(shape))
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(shape)

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        with self._lock:
            for _ in range(len(self._free)):
                memory = self._free.popleft()
                if memory.nbytes == num_bytes:
                    return memory
                self._free.append(memory)
        return np.empty(num_bytes, np.uint8)


def _rounded(num_bytes: int) -> int:
    """Return the size up to which to round, so that what is nearly equal can be exchanged."""
    step = 1 << max(0, num_bytes.bit_length() - 1 - (STEPS_PER_DOUBLING.bit_length() - 1))
    return -(-num_bytes // step) * step
