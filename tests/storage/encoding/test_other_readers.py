"""What we write is Zarr for everybody: zarr-python, tensorstore and zarrs read every array."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from storage.encoding.zarr_arrays import LoadedArray, load_arrays
from storage.profiles import PROFILES
from storage.store import Store
from tests.storage.synthetic import (
    change_inside,
    data_key,
    fill,
    make_identity,
    make_samples,
    zarr_objects,
)


def with_zarr(path: Path, name: str) -> np.ndarray:
    with ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        return np.asarray(group[name][...])


def with_zarrs(path: Path, name: str) -> np.ndarray:
    """It reads folders: any tool unpacks one."""
    pytest.importorskip("zarrs")
    folder = path.with_suffix("")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(folder / name, mode="r")[...])


def with_tensorstore(path: Path, name: str) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    base = {"driver": "file", "path": str(path)}
    spec = {"driver": "zarr3", "kvstore": {"driver": "zip", "base": base, "path": f"{name}/"}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


@pytest.mark.parametrize("read", [with_zarr, with_zarrs, with_tensorstore])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_array_reads_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
    read: Callable[[Path, str], np.ndarray],
) -> None:
    monkeypatch.setattr(
        "storage.encoding.state_chunks.CHUNK_VALUES", 64 * 20
    )  # several chunks, a padded one
    monkeypatch.setattr("storage.encoding.zarr_arrays.INNER_CHUNK_BYTES", 64)
    store = Store.create(str(tmp_path / "store"), make_identity(profile=profile))
    fill(store, make_samples(3), shard_tokens=10**6)
    (shard_id,) = store.shard_ids()
    path = tmp_path / "store" / data_key(store, shard_id)
    arrays: dict[str, LoadedArray] = dict(load_arrays(zarr_objects(store, shard_id), what="test"))
    assert max(np.prod(array.layout.grid) for array in arrays.values()) > 9
    for name, array in arrays.items():
        expected = array.whole()
        found = read(path, name)
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("read", [with_zarr, with_zarrs, with_tensorstore])
def test_others_notice_a_flipped_byte(
    tmp_path: Path, read: Callable[[Path, str], np.ndarray]
) -> None:
    """They do not know our digests, but every chunk ends in its crc32c, every object has a CRC."""
    store = Store.create(str(tmp_path / "store"), make_identity())
    fill(store, make_samples(3), shard_tokens=10**6)
    (shard_id,) = store.shard_ids()
    name = "aux_hidden_states_mantissas"

    def flip(data: bytes) -> bytes:
        at = len(data) // 3
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    path = tmp_path / "store" / data_key(store, shard_id)
    path.write_bytes(change_inside(path.read_bytes(), f"{name}/c.0.0.0", flip))
    with pytest.raises(
        Exception, match=r"(?i)checksum|crc|digest"
    ):  # each library has its own class
        read(path, name)


def test_every_object_has_a_right_zip_checksum(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"), make_identity())
    fill(store, make_samples(3), shard_tokens=10**6)
    (shard_id,) = store.shard_ids()
    with zipfile.ZipFile(tmp_path / "store" / data_key(store, shard_id)) as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found == {key: bytes(data) for key, data in zarr_objects(store, shard_id).items()}
