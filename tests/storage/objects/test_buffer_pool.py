"""Memory of dead arrays serves the next ones, never one that somebody still sees."""

import threading

import numpy as np

from storage.objects.buffer_pool import SMALLEST, RecycledMemory

SIZE = 2 * SMALLEST


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_a_dead_arrays_memory_is_used_again() -> None:
    memory = RecycledMemory(most_free=2)
    first = memory.empty((SIZE,), np.uint8)
    where = address(first)
    del first
    second = memory.empty((SIZE // 8, 4), np.uint16)
    assert address(second) == where
    assert second.shape == (SIZE // 8, 4)
    assert second.flags.writeable


def test_sizes_that_are_nearly_equal_share_memory() -> None:
    memory = RecycledMemory(most_free=2)
    where = address(memory.empty((SIZE - 5000,), np.uint8))
    assert address(memory.empty((SIZE - 9000,), np.uint8)) == where


def test_memory_of_another_size_is_not_taken() -> None:
    memory = RecycledMemory(most_free=2)
    small = address(memory.empty((SIZE,), np.uint8))
    large = memory.empty((3 * SIZE,), np.uint8)
    assert large.shape == (3 * SIZE,)
    assert address(memory.empty((SIZE,), np.uint8)) == small


def test_a_view_keeps_the_memory_of_its_array() -> None:
    memory = RecycledMemory(most_free=2)
    whole = memory.empty((4, SIZE), np.uint8)
    whole[...] = 7
    view = np.moveaxis(whole, 0, 1)[10:20].T[1:2].view(np.int8)
    del whole
    others = [memory.empty((4, SIZE), np.uint8) for _ in range(3)]
    for other in others:
        other[...] = 9
    assert (view == 7).all()


def test_free_memory_is_limited() -> None:
    memory = RecycledMemory(most_free=2)
    arrays = [memory.empty((SIZE,), np.uint8) for _ in range(5)]
    arrays.clear()
    assert len(memory._free) == 2


def test_arrays_of_several_threads_never_overlap() -> None:
    memory = RecycledMemory(most_free=4)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            array = memory.empty((SMALLEST,), np.uint8)
            array[::4096] = number
            if (array[::4096] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
