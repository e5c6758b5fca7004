"""What we write is Zarr for everybody: zarr-python, tensorstore and zarrs read every array."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage.arrays import LoadedArray, load_arrays
from storage.identity import PROFILES
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples


def with_zarr(path: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(path, mode="r")[...])


def with_zarrs(path: Path) -> np.ndarray:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(path, mode="r")[...])


def with_tensorstore(path: Path) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


@pytest.mark.parametrize("read", [with_zarr, with_zarrs, with_tensorstore])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_array_reads_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
    read: Callable[[Path], np.ndarray],
) -> None:
    monkeypatch.setattr("storage.profile.CHUNK_VALUES", 64 * 20)  # several chunks, a padded one
    monkeypatch.setattr("storage.arrays.INNER_CHUNK_BYTES", 64)
    store = Store.create(str(tmp_path / "store"), make_identity(profile=profile))
    fill(store, make_samples(3), shard_tokens=10**6)
    (record,) = store.commits().values()
    folder = tmp_path / "store" / "shards" / record.shard_id
    objects = {key: (folder / key).read_bytes() for key in record.objects}
    arrays: dict[str, LoadedArray] = dict(load_arrays(objects, what="test"))
    assert max(np.prod(array.layout.grid) for array in arrays.values()) > 9
    for name, array in arrays.items():
        expected = array.whole()
        found = read(folder / name)
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("read", [with_zarr, with_zarrs, with_tensorstore])
def test_others_notice_a_flipped_byte(tmp_path: Path, read: Callable[[Path], np.ndarray]) -> None:
    """They do not know our digests, but every chunk ends in its crc32c."""
    store = Store.create(str(tmp_path / "store"), make_identity())
    fill(store, make_samples(3), shard_tokens=10**6)
    (record,) = store.commits().values()
    name = "aux_hidden_states_mantissas"
    folder = tmp_path / "store" / "shards" / record.shard_id / name
    shard = folder / "c.0.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        Exception, match=r"(?i)checksum|crc|digest"
    ):  # each library has its own class
        read(folder)
