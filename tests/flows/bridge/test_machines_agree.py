"""What machines compare before their first step together; two threads are two machines here."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from eagle_core.errors import ConfigError, MismatchError, TransientError
from eagle_core.training.distributed import ONE_PROCESS, Processes
from flows.bridge import machines_agree
from flows.bridge.draft_setup import VOCABULARY_NAME
from flows.bridge.machines_agree import on_all_or_none, require_same_files
from flows.bridge.run_lock import sole_training

Check = Callable[[Processes], None]


def on_both(first: Check, other: Check) -> list[BaseException | None]:
    """Let two machines check at the same time, and return how each ended."""
    board = HashStore()
    board.set_timeout(timedelta(seconds=60))
    with ThreadPoolExecutor() as pool:
        futures: list[Future[None]] = [
            pool.submit(check, Processes(rank=rank, world_size=2, board=board))
            for rank, check in enumerate((first, other))
        ]
        return [future.exception() for future in futures]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines_agree, "SHARED_SECONDS", 0.0)


def test_machines_that_see_the_same_files_go_on(tmp_path: Path) -> None:
    (tmp_path / VOCABULARY_NAME).write_bytes(b"vocabulary")
    with sole_training(tmp_path) as lock:

        def check(processes: Processes) -> None:
            require_same_files(processes, tmp_path, {}, meeting_id=lock.token)

        assert on_both(check, check) == [None, None]


def test_a_machine_with_other_files_is_named_on_all(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    with sole_training(shared) as lock, sole_training(own) as other_lock:
        (shared / VOCABULARY_NAME).write_bytes(b"vocabulary")
        files = {"the tokens": shared / VOCABULARY_NAME}
        missing = {"the tokens": own / VOCABULARY_NAME}
        found = on_both(
            lambda first: require_same_files(first, shared, files, meeting_id=lock.token),
            lambda other: require_same_files(other, own, missing, meeting_id=lock.token),
        )
    for error in found:
        assert isinstance(error, MismatchError)
        said = str(error)
        assert f"lock is {other_lock.token}, on the first machine {lock.token}" in said
        assert f"{VOCABULARY_NAME} is None, on the first machine" in said
        assert "the tokens is None, on the first machine 10 bytes" in said
        assert "`home` and the store must be on a file system that all machines share" in said


def test_what_fails_on_one_machine_ends_all() -> None:
    def fails(processes: Processes) -> None:
        with on_all_or_none(processes, "work"):
            raise ConfigError("no such folder")

    def works(processes: Processes) -> None:
        with on_all_or_none(processes, "work"):
            pass

    first, other = on_both(works, fails)
    assert isinstance(other, ConfigError)
    assert isinstance(first, MismatchError)
    assert "failed: no such folder" in str(first)
    assert on_both(works, works) == [None, None]
    works(ONE_PROCESS)


def test_a_machine_that_ends_before_is_missed_in_time() -> None:
    board = HashStore()
    board.set_timeout(timedelta(seconds=1))
    with pytest.raises(TransientError, match="another machine ended before the first step"):
        Processes(rank=1, world_size=2, board=board).from_first("job", None)
