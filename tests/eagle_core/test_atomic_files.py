"""What is written appears whole or not at all, and a disk that refuses is one error with a path."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from eagle_core.atomic_files import atomic_file, atomic_folder, disk_errors, write_text
from eagle_core.data.ledger import Change
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import DiskError
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.tokenization.token_file import write_token_file
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import Checkpoint
from eagle_core.training.loader import LoaderState
from tests.eagle_core.random_source import random_draft
from tests.paths import ROOT

_WRITE_AND_WAIT = """
import sys
from pathlib import Path
from eagle_core.atomic_files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_replaced_whole_and_kept_where_that_fails(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "made") as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "file").write_text(content)
    assert (tmp_path / "made" / "deep" / "file").read_text() == "two"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "made") as partial:
        _write_and_fail(partial / "other")
    with atomic_folder(tmp_path / "made", replace=False) as partial:
        (partial / "other").write_text("four")
    assert _names(tmp_path / "made") == {"deep"}
    assert _names(tmp_path) == {"made"}
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_a_file_is_replaced_whole_and_kept_where_that_fails(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "one")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as partial:
        _write_and_fail(partial)
    assert (tmp_path / "file").read_text() == "one"
    assert _names(tmp_path) == {"file"}
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _write_and_fail(path: Path) -> None:
    path.write_text("other")
    raise RuntimeError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_a_kill_left_goes_with_the_next_and_who_is_at_work_is_left_alone(
    tmp_path: Path,
) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITE_AND_WAIT, str(tmp_path / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for name in ("killed", "living")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
    killed, living = writers
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    others = (".partial-otherhost-abc", f".partial-{socket.gethostname()}-1-abc")
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".partial-ofbefore").mkdir()
    assert len(_names(tmp_path)) == 5
    write_text(tmp_path / "file", "text")
    left = _names(tmp_path)
    assert len(left) == 4
    assert {"file", *others} < left
    living.communicate()
    assert _names(tmp_path) == {"file", "living", *others}


_WRITE_MUCH = """
import sys
from pathlib import Path
from eagle_core.atomic_files import write_text
for number in range(200):
    write_text(Path(sys.argv[1]) / sys.argv[2], str(number))
"""


def test_writers_side_by_side_leave_each_other_alone(tmp_path: Path) -> None:
    """None takes for dead whoever has just begun."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITE_MUCH, str(tmp_path), name],
            cwd=ROOT,
        )
        for name in ("one", "two", "three")
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert _names(tmp_path) == {"one", "two", "three"}


@contextmanager
def _no_file_above(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _vocabulary(folder: Path) -> None:
    DraftVocabulary.build(np.arange(5000), size=2000).save(folder / "made")


def _tokens(folder: Path) -> None:
    ids, mask = np.arange(5000, dtype=np.int32), np.ones(5000, dtype=np.bool_)
    sample = TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)
    write_token_file(folder / "made", [sample])


def _ledger(folder: Path) -> None:
    with LedgerWriter(folder / "made") as ledger:
        for number in range(5000):
            change = next(iter(Change))
            ledger.change(change, location=str(number), conversation_id=f"{number:x}")


def _checkpoint(folder: Path) -> None:
    draft, _ = random_draft()
    record = Checkpoint(step=1, loader=LoaderState(source_id="s", seed=0), identity={}, figures={})
    checkpoint.save(folder, record, draft.state_dict(), {}, keep_last=1)


def _export(folder: Path) -> None:
    draft, _ = random_draft()
    served = ServedTarget(
        name_or_path="target",
        architectures=("LlamaForCausalLM",),
        aux_layers=(1, 3, 4),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    export(draft, served, folder, ExportConfig(layouts=("serving",)))


@pytest.mark.parametrize("write", [_vocabulary, _tokens, _ledger, _checkpoint, _export])
def test_a_disk_that_takes_no_more_is_one_error_with_the_path_and_nothing_is_left(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    folder = tmp_path / "folder"
    with _no_file_above(3000), pytest.raises(DiskError, match=rf"cannot write {folder}/.*--home"):
        write(folder)
    assert not [path for path in folder.rglob("*") if path.is_file() or "partial" in path.name]


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "No space left on device; free disk space"),
        (errno.EROFS, "Read-only file system; make it writable"),
        (errno.EACCES, "Permission denied; make it writable"),
        (errno.EIO, "Input/output error; fix that"),
    ],
)
def test_each_refusal_has_its_cure(tmp_path: Path, number: int, cure: str) -> None:
    path = tmp_path / "file"
    refused = OSError(number, os.strerror(number), str(path))
    with pytest.raises(DiskError, match=f"cannot write {path}: {cure}"), disk_errors(path):
        raise refused


def test_a_folder_above_that_refuses_is_named_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where the folder belongs")
    with pytest.raises(DiskError, match=r"cannot write .*home/runs/x: .*--home"):
        write_text(home / "runs" / "x", "text")


def test_what_is_read_elsewhere_keeps_its_error(tmp_path: Path) -> None:
    beside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "raw.jsonl"))
    with pytest.raises(PermissionError), disk_errors(tmp_path / "prepared"):
        raise beside
    with pytest.raises(PermissionError), disk_errors(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/data.json")
    with pytest.raises(ConnectionResetError), disk_errors(tmp_path / "file"):
        raise ConnectionResetError
