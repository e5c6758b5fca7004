"""Read a file of `torch.save` without running any code that is in it.

Only tensors and plain values are unpickled (`weights_only`). torch does not verify the checksums of
its archive, so they are verified here, as are those of gzip.
"""

import gzip
import io
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eagle_core.data.ledger import Reason, RejectedRecord

_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_POINTER = b"version https://git-lfs"
_PLAIN = frozenset(
    {
        torch.bool,
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    }
)


def read_torch_file(path: Path, location: str) -> Mapping[str, object]:
    """Return the dictionary in a file, which may be gzipped.

    Raises:
        RejectedRecord: it is damaged, holds anything but tensors and plain values, or no
            dictionary.

    """
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise RejectedRecord(Reason.UNREADABLE, location, _one_line(error)) from error
    if not data:
        raise RejectedRecord(Reason.UNREADABLE, location, "the file is empty")
    if data.startswith(_POINTER):
        raise RejectedRecord(Reason.UNREADABLE, location, "a Git LFS pointer, not the file itself")
    try:
        _require_checksums(data)
        with warnings.catch_warnings():  # what torch would warn of is refused
            warnings.simplefilter("ignore")
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        is_code = "unsupported" in str(error).lower()
        reason = Reason.FORBIDDEN_PICKLE if is_code else Reason.UNREADABLE
        raise RejectedRecord(reason, location, _cause(error)) from error
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        raise RejectedRecord(Reason.UNREADABLE, location, _one_line(error)) from error
    if not isinstance(found, dict):
        detail = f"holds a {type(found).__name__}, expected a dictionary of tensors"
        raise RejectedRecord(Reason.WRONG_KEYS, location, detail)
    return found


def tensor(
    found: Mapping[str, object], name: str, location: str, *, known: Sequence[str]
) -> Tensor:
    """Return a tensor of a row by name; RejectedRecord lists what there is instead."""
    value = found.get(name)
    if not isinstance(value, Tensor):
        there = ", ".join(map(str, found)) or "nothing"
        what = "is no tensor" if name in found else "is missing"
        detail = f"{name} {what}; expected {', '.join(known)}, found {there}"
        raise RejectedRecord(Reason.WRONG_KEYS, location, detail)
    if obstacle := _obstacle(value):
        raise RejectedRecord(Reason.UNREADABLE, location, f"{name} {obstacle}")
    return value.detach()


def _obstacle(value: Tensor) -> str:
    """Return why a tensor does not hold its own numbers; empty if it does."""
    if value.device.type != "cpu":
        return f"is on the device {value.device}, without values"
    if value.is_nested or value.layout != torch.strided:
        return f"is nested or sparse ({value.layout})"
    if value.is_quantized or value.dtype not in _PLAIN:
        return f"is of {value.dtype}"
    stored = value.untyped_storage().nbytes()
    needed = value.numel() * value.element_size()
    if needed > stored:
        return f"of {list(value.shape)} needs {needed:,} bytes, and {stored:,} are stored"
    return ""


def optional_tensor(
    found: Mapping[str, object], name: str, location: str, *, known: Sequence[str]
) -> Tensor | None:
    """Return a tensor of a row, or None if there is no such key."""
    return None if found.get(name) is None else tensor(found, name, location, known=known)


def _require_checksums(data: bytes) -> None:
    """Raise BadZipFile if an entry of an archive differs from its checksum, where it has one."""
    if not data.startswith(_ZIP):
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        has_sums = any(entry.CRC for entry in archive.infolist())  # torch can omit them
        damaged = archive.testzip() if has_sums else None
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} differs from its checksum")


def _cause(error: Exception) -> str:
    """Return what of a pickle was refused: the global's name, not torch's advice to allow it."""
    lines = [line.strip() for line in str(error).splitlines()]
    cause = next((line for line in lines if "unsupported" in line.lower()), "a damaged pickle")
    return cause.removeprefix("Trying to load ")[:200]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
