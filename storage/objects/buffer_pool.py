"""Reuse the memory of freed arrays for new ones.

The first touch of fresh memory takes the system about as long as copying into it. A reader keeps
replacing shards of about equal size, so it can avoid that.
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
"""Returns an array of a shape and a dtype with undefined values, like `numpy.empty`."""

SMALLEST = 1 << 20
"""Size in bytes below which the C library itself reuses memory well enough."""
STEPS_PER_DOUBLING = 8


class RecycledMemory:
    """Allocates like `numpy.empty`, from the memory of arrays that are no longer referenced.

    Views keep an array's memory alive, as usual. Safe to use from several threads.
    """

    def __init__(self, most_free: int) -> None:
        """Keep at most `most_free` unused buffers."""
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=most_free)
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array of undefined values."""
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < SMALLEST:
            return np.empty(shape, dtype)
        memory = self._take(_rounded(num_bytes))
        # Built on a memoryview: on an array, views would refer to `memory`, not to this array.
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
    """Round a size up, so that buffers of nearly equal size are interchangeable."""
    step = 1 << max(0, num_bytes.bit_length() - 1 - (STEPS_PER_DOUBLING.bit_length() - 1))
    return -(-num_bytes // step) * step
