"""Which files are the weights, and what their headers may say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eagle_core.errors import CorruptError
from eagle_core.safetensors_files import read_header

Header = dict[str, Any]


def _overlap(header: Header) -> None:
    header["b"]["data_offsets"] = header["a"]["data_offsets"]


def _gap(header: Header) -> None:
    header["a"]["data_offsets"][1] -= 8


def _other_dtype(header: Header) -> None:
    header["a"]["dtype"] = "F32"


def _other_shape(header: Header) -> None:
    header["b"]["shape"] = [3, 4]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_overlap, r"places b at byte 0, where 16 was expected"),
        (_gap, r"gives a 8 bytes, which is not BF16 of shape \[2, 4\]"),
        (_other_dtype, r"gives a 16 bytes, which is not F32 of shape \[2, 4\]"),
        (_other_shape, r"gives b 16 bytes, which is not BF16 of shape \[3, 4\]"),
    ],
)
def test_a_header_that_contradicts_itself_is_named(
    tmp_path: Path, damage: Callable[[Header], None], said: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(2, 4, dtype=torch.bfloat16) for name in "abc"}, path)
    assert set(read_header(path, remedy="copy it")) == {"a", "b", "c"}
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    damage(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(
        CorruptError, match=rf"model\.safetensors is damaged: its header {said}; .*copy it"
    ):
        read_header(path, remedy="copy it")
