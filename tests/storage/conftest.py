"""Stores to test: empty, and filled with synthetic samples, in every place a store may lie."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from storage.records.identity import StoreIdentity
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.seaweed import BUCKET, S3Server, seaweed
from tests.storage.synthetic import fill, make_identity, make_samples

PLACES = ["local", "memory", pytest.param("s3", marks=pytest.mark.s3)]
REMOTE_PLACES = PLACES[1:]


@pytest.fixture
def identity() -> StoreIdentity:
    """Return the identity of the synthetic samples."""
    return make_identity()


@pytest.fixture
def samples() -> list[StoredSample]:
    """Return a dozen samples."""
    return make_samples(12)


@pytest.fixture
def store(tmp_path: Path, identity: StoreIdentity) -> Store:
    """Return an empty store."""
    return Store.create(str(tmp_path / "store"), identity)


@pytest.fixture
def filled(store: Store, samples: list[StoredSample]) -> Store:
    """Return a store that holds and publishes all samples."""
    fill(store, samples)
    store.publish([sample.sample_id for sample in samples])
    return store


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run one SeaweedFS for all tests of this process."""
    with seaweed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def s3_root(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a fresh root on the S3 server, with the usual variables set."""
    return s3_root_at(s3_server, tmp_path, monkeypatch)


@pytest.fixture(params=PLACES)
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a fresh root in each place."""
    return root_at(request.param, request, tmp_path, monkeypatch)


@pytest.fixture(params=REMOTE_PLACES)
def remote_root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Return a fresh root in each place where nothing can be locked."""
    return root_at(request.param, request, tmp_path, monkeypatch)


@pytest.fixture(scope="module", params=PLACES)
def lasting_root(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Yield a root in each place that lasts for all tests of a module."""
    with pytest.MonkeyPatch.context() as environment:
        yield root_at(request.param, request, tmp_path_factory.mktemp("lasting"), environment)


def root_at(
    place: str, request: pytest.FixtureRequest, folder: Path, environment: pytest.MonkeyPatch
) -> str:
    """Return a fresh root in one place."""
    if place == "local":
        return str(folder / "store")
    if place == "memory":
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        return "memory://store"
    return s3_root_at(request.getfixturevalue("s3_server"), folder, environment)


def s3_root_at(server: S3Server, folder: Path, environment: pytest.MonkeyPatch) -> str:
    """Return a fresh root on an S3 server to which the usual variables lead."""
    for name, value in server.variables.items():
        environment.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it knows nothing of changed variables
    return f"s3://{BUCKET}/{folder.name}"  # one bucket: the server sets volumes aside for each
