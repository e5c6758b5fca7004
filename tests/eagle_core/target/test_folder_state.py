"""A folder's state changes with any of its files."""

import os
import shutil
import time
from pathlib import Path
from threading import Event, Thread

from eagle_core.target.folder_state import FolderState


def test_every_change_of_a_file_is_another_state(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "parts").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "parts" / "one").write_text("1")
    states = [FolderState.of(folder)]
    assert FolderState.of(folder) == states[0]
    os.utime(folder / "parts" / "one", ns=(1, 1))
    states.append(FolderState.of(folder))
    (folder / "parts" / "two").write_text("2")
    states.append(FolderState.of(folder))
    (tmp_path / "blob").write_text("of the hub's cache")
    (folder / "linked").symlink_to(tmp_path / "blob")
    states.append(FolderState.of(folder))
    (tmp_path / "blob").write_text("another length")
    states.append(FolderState.of(folder))
    (folder / "parts" / "one").unlink()
    states.append(FolderState.of(folder))
    assert len(set(states)) == len(states)


def test_an_edit_that_keeps_size_and_time_is_another_state(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("1")
    states = [FolderState.of(tmp_path)]
    before = path.stat()
    time.sleep(0.05)  # the clock of a file system ticks every few milliseconds
    path.write_text("2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    states.append(FolderState.of(tmp_path))
    shutil.copy2(path, tmp_path / "new")
    (tmp_path / "new").replace(path)
    states.append(FolderState.of(tmp_path))
    assert len(set(states)) == len(states)


def test_a_link_to_another_folder_is_another_state(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        os.utime(tmp_path / name / "config.json", ns=(1, 1))
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "one")
    before = FolderState.of(link)
    assert before == FolderState.of(link)
    assert before.folder == link
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert FolderState.of(link) != before


def test_a_link_to_another_folder_inside_is_another_state(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    states = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (folder / "weights").unlink(missing_ok=True)
        (folder / "weights").symlink_to(tmp_path / name)
        states.append(FolderState.of(folder))
    assert states[0] != states[1]


def test_files_and_folders_that_come_and_go_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    done = Event()

    def download() -> None:
        while not done.is_set():
            for number in range(40):
                (tmp_path / f"part{number}").mkdir()
                (tmp_path / f"part{number}" / "file.incomplete").touch()
                (tmp_path / f"{number}.incomplete").touch()
            for number in range(40):
                (tmp_path / f"{number}.incomplete").unlink()
                shutil.rmtree(tmp_path / f"part{number}")

    thread = Thread(target=download)
    thread.start()
    try:
        states = [FolderState.of(tmp_path) for _ in range(100)]
    finally:
        done.set()
        thread.join()
    assert all("config.json" in dict(state.files) for state in states)
    assert "dangling" not in dict(FolderState.of(tmp_path).files)
