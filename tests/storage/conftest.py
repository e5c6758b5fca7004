"""Stores to test: empty, and filled with synthetic samples."""

from pathlib import Path

import pytest

from storage.identity import StoreIdentity
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples


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
