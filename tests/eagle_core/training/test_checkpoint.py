"""Checkpoints that are not as they were written, and what a kill leaves of one."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from eagle_core.errors import ConfigError
from eagle_core.training import checkpoint
from eagle_core.training.loader import LoaderState


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Steps 1 and 2 of a run."""
    tensors = {"weight": torch.zeros(3)}
    loader = LoaderState(source_id="s", seed=0)
    first, second = (
        checkpoint.save(
            tmp_path,
            checkpoint.Checkpoint(step=step, loader=loader, identity={}, figures={}),
            tensors,
            tensors,
            keep_last=2,
        )
        for step in (1, 2)
    )
    return first, second


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("files"),
        lambda state: state["files"].clear(),
        lambda state: state.pop("loader"),
        lambda state: state.update(loader=[]),
        lambda state: state.update(step="two"),
        lambda state: state.update(format_version=99),
        lambda state: state.update(identity=None),
        lambda state: state.update(step=7),
    ],
    ids=["no files", "empty files", "no loader", "list", "step", "version", "identity", "other"],
)
def test_an_odd_record_is_damage_and_the_one_before_is_used(
    two_checkpoints: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], None],
) -> None:
    first, second = two_checkpoints
    state = json.loads((second / "state.json").read_text())
    change(state)
    (second / "state.json").write_text(json.dumps(state))
    assert checkpoint.newest(tmp_path) == first
    assert f"{second.name} is damaged" in caplog.text
    (second / "state.json").write_text("[]")
    assert checkpoint.newest(tmp_path) == first


def test_a_checkpoint_is_read_once_to_check_it(
    two_checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large draft have gigabytes; each save and each start asks several times."""
    first, second = two_checkpoints
    read: list[Path] = []
    digest = checkpoint.file_digest

    def counted(path: Path) -> str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(checkpoint, "file_digest", counted)
    for _ in range(3):
        assert checkpoint.sound_folders(tmp_path) == [second, first]
        assert checkpoint.newest(tmp_path) == second
    # The first one was read when the second was saved.
    assert sorted(read) == [second / "draft.safetensors", second / "optimizer.safetensors"]


def test_damage_after_a_check_is_seen(
    two_checkpoints: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the size and the time of the last change by its owner stay."""
    first, second = two_checkpoints
    weights = second / "draft.safetensors"
    assert checkpoint.newest(tmp_path) == second
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checkpoint.newest(tmp_path) == first
    assert f"{second.name} is damaged" in caplog.text


def test_what_a_kill_left_of_a_checkpoint_goes_with_the_next(
    two_checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = two_checkpoints
    left = first.parent / ".partial-killed"
    left.mkdir()
    (left / "draft.safetensors").write_bytes(b"gigabytes")
    (first.parent / ".partial-file").touch()
    loader = LoaderState(source_id="s", seed=0)
    record = checkpoint.Checkpoint(step=3, loader=loader, identity={}, figures={})
    third = checkpoint.save(tmp_path, record, {}, {}, keep_last=3)
    assert not left.exists()
    assert sorted(first.parent.glob("step-*")) == [first, second, third]


def test_checkpoints_that_cannot_be_listed_are_no_run_that_has_not_begun(
    two_checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    denied = PermissionError(13, "Permission denied", str(two_checkpoints[0].parent))
    with (
        mock.patch("os.listdir", side_effect=denied),
        mock.patch("os.scandir", side_effect=denied),
        pytest.raises(ConfigError, match=r"Permission denied.*checkpoints"),
    ):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "draft.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged_and_stays(
    two_checkpoints: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    first, second = two_checkpoints
    opened = io.open

    def fails(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(second / name):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *arguments, **options)

    loader = LoaderState(source_id="s", seed=0)
    record = checkpoint.Checkpoint(step=3, loader=loader, identity={}, figures={})
    with mock.patch("io.open", fails):
        with pytest.raises(ConfigError, match="cannot read checkpoint step-00000002"):
            checkpoint.newest(tmp_path)
        third = checkpoint.save(tmp_path, record, {}, {}, keep_last=1)
    assert "keeping it" in caplog.text
    assert sorted(first.parent.iterdir()) == [second, third]
