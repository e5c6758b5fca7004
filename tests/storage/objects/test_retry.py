"""Only transient failures are tried again, and not for ever."""

import pytest

from storage.errors import CorruptError, StorageError, TransientError
from storage.objects.retry import retried


@pytest.mark.parametrize(
    ("error", "failures", "calls"),
    [(TransientError, 2, 3), (TransientError, 9, 4), (CorruptError, 1, 1)],
)
def test_calls(error: type[StorageError], failures: int, calls: int) -> None:
    made = []

    def attempt() -> str:
        made.append(1)
        if len(made) <= failures:
            raise error("no")
        return "yes"

    if failures < calls:
        assert retried(attempt, pauses_seconds=(0, 0, 0)) == "yes"
    else:
        with pytest.raises(error):
            retried(attempt, pauses_seconds=(0, 0, 0))
    assert len(made) == calls
