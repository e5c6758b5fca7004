"""A folder's state changes with any of its files."""

import os
from pathlib import Path

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
