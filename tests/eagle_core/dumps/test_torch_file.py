"""Files of torch.save: no code runs, and damage is named."""

import gzip
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.dumps.torch_file import read_torch_file, tensor

DOCUMENT = {"input_ids": torch.arange(2000), "hidden": torch.randn(40, 64).bfloat16()}


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def _reason(path: Path) -> Reason:
    with pytest.raises(RejectedRecord) as found:
        read_torch_file(path, path.name)
    assert found.value.location == path.name
    assert found.value.detail
    assert "weights_only" not in found.value.detail  # no advice to allow it
    return found.value.reason


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("is_gzipped", [True, False])
def test_a_sound_file_is_read(tmp_path: Path, *, is_zip: bool, is_gzipped: bool) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(DOCUMENT, path, _use_new_zipfile_serialization=is_zip)
    if is_gzipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = read_torch_file(path, "a")
    assert torch.equal(tensor(found, "hidden", "a", known=()), DOCUMENT["hidden"])


@pytest.mark.parametrize("is_torch", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, *, is_torch: bool) -> None:
    path, trace = tmp_path / "a.ckpt", tmp_path / "ran"
    if is_torch:
        torch.save({"input_ids": _Touch(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"input_ids": _Touch(trace)}))
    assert _reason(path) is Reason.FORBIDDEN_PICKLE
    assert not trace.exists()


@pytest.mark.parametrize("is_gzipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_file_is_unreadable(tmp_path: Path, share: float, *, is_gzipped: bool) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(DOCUMENT, path)
    data = path.read_bytes()
    data = gzip.compress(data) if is_gzipped else data
    path.write_bytes(data[: int(share * len(data))])
    assert _reason(path) is Reason.UNREADABLE


@pytest.mark.parametrize("is_gzipped", [True, False])
def test_a_flipped_bit_of_the_states_is_noticed(tmp_path: Path, *, is_gzipped: bool) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(DOCUMENT, path)
    data = bytearray(path.read_bytes())
    data = bytearray(gzip.compress(data, compresslevel=0)) if is_gzipped else data
    states = DOCUMENT["hidden"].view(torch.uint8).numpy().tobytes()
    data[data.index(states[:64]) + 30] ^= 4
    path.write_bytes(data)
    assert _reason(path) is Reason.UNREADABLE


@pytest.mark.parametrize("data", [b"\0" * 4096, b"hello", b"version https://git-lfs 1\n"])
def test_what_is_no_dump_is_unreadable(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _reason(path) in {Reason.UNREADABLE, Reason.FORBIDDEN_PICKLE}


def test_other_content_than_a_dictionary_of_tensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save([torch.zeros(2)], path)
    assert _reason(path) is Reason.WRONG_KEYS
    torch.save({"input_ids": [1, 2], "other": 3}, path)
    found = read_torch_file(path, "a")
    with pytest.raises(RejectedRecord, match="input_ids is no tensor; expected x, found input_ids"):
        tensor(found, "input_ids", "a", known=("x",))
    with pytest.raises(RejectedRecord, match="y is missing"):
        tensor(found, "y", "a", known=("x",))


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (torch.zeros(1).expand(1 << 20), "needs 4,194,304 bytes, and 4 are stored"),
        (torch.zeros(4, device="meta"), "is on the device meta"),
        (torch.zeros(4).to_sparse(), "is nested or sparse"),
        (torch.zeros(4, dtype=torch.complex64), "is of torch.complex64"),
    ],
)
def test_a_tensor_without_numbers_of_its_own_is_unreadable(
    value: torch.Tensor, detail: str
) -> None:
    with pytest.raises(RejectedRecord, match=detail) as found:
        tensor({"a": value}, "a", "here", known=())
    assert found.value.reason is Reason.UNREADABLE
