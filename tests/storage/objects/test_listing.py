"""What cannot be listed is an error: it never reads as an empty place, and costs no byte."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import s3fs

from storage.errors import ConfigError, TransientError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.verify import verify_store
from storage.objects.retry import PAUSES_SECONDS, retried
from storage.store import Store
from tests.storage.seaweed import SLOW_DOWN, Answer, S3Server, faulty_proxy
from tests.storage.synthetic import fill, make_identity, make_samples, planned, tree_digests


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again as often as ever, but soon."""
    soon = [0.001] * len(PAUSES_SECONDS)
    monkeypatch.setitem(retried.__kwdefaults__ or {}, "pauses_seconds", soon)


@contextmanager
def failing(ending: str, number: int) -> Iterator[None]:
    """Let the disk fail to list folders whose path ends so, with error `number`."""
    scandir = os.scandir

    def listed(path: Any) -> Any:
        if os.fspath(path).endswith(ending):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return scandir(path)

    with mock.patch("os.scandir", listed):
        yield


def _collect_all(store: Store) -> None:
    collect(
        store,
        find_garbage(store, keep=snapshots_to_keep(store, older_than_hours=0), older_than_hours=0),
    )


@pytest.mark.parametrize("prefix", ["snapshots", "commits", "plans", "shards"])
@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EIO, TransientError), (errno.EACCES, ConfigError)]
)
def test_a_disk_that_fails_to_list_costs_nothing(
    filled: Store, prefix: str, number: int, expected: type[Exception]
) -> None:
    before = tree_digests(filled)
    with failing(f"/{prefix}", number):
        with pytest.raises(expected, match=f"/{prefix}"):
            _collect_all(filled)
        with pytest.raises(expected, match=f"/{prefix}"):
            filled.root.sizes(prefix)
        if prefix in {"commits", "plans"}:
            with pytest.raises(expected):
                filled.plan(planned(make_samples(12)), shard_tokens=60)
    assert tree_digests(filled) == before


def test_a_folder_within_that_fails_is_no_missing_object(filled: Store) -> None:
    shard_id = filled.shard_ids()[0]
    with (
        failing(f"shards/{shard_id}", errno.EIO),
        pytest.raises(TransientError, match=shard_id),
    ):
        verify_store(filled, deep=False)


def test_what_vanishes_while_it_is_listed_is_left_out(filled: Store) -> None:
    """Another writer's temporary file, perhaps: everything beside it is listed."""
    expected = filled.root.sizes("commits")
    gone = Path(filled.root.root) / "commits" / "gone.json"
    gone.symlink_to("nowhere")
    assert filled.root.sizes("commits") == expected
    assert filled.root.sizes("no such folder") == {}


def test_what_others_left_among_the_shards_stops_nothing(filled: Store) -> None:
    """A file of a desktop, a link that leads back to itself, a file in a shard's place."""
    shards = Path(filled.root.root) / "shards"
    expected = filled.root.sizes("shards")
    (shards / ".DS_Store").write_bytes(b"desktop")
    (shards / filled.shard_ids()[0] / "loop").symlink_to("loop")
    assert {**filled.root.sizes("shards")} == {**expected, ".DS_Store": 7}
    assert verify_store(filled, deep=True) == []
    part = filled.publish([make_samples(12)[0].sample_id])
    collect(filled, find_garbage(filled, keep=[part.snapshot_id], older_than_hours=0))
    assert set(filled.shard_ids()) == set(part.shard_ids)

    (kept,) = part.shard_ids
    shutil.rmtree(shards / kept)
    (shards / kept).write_bytes(b"a file where the shard's folder belongs")
    assert {finding.shard_id for finding in verify_store(filled, deep=False)} == {kept}


@pytest.mark.s3
def test_a_server_that_fails_to_list_costs_nothing(
    s3_server: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        store = Store.create(s3_root, make_identity())
        samples = make_samples(2)
        fill(store, samples, shard_tokens=10**6)
        store.publish([sample.sample_id for sample in samples])
        before = tree_digests(store)
        for answer, expected in (
            (Answer(status=403, code="AccessDenied"), ConfigError),
            (SLOW_DOWN, TransientError),
            (Answer(status=404, code="NoSuchBucket"), ConfigError),
        ):
            for prefix in ("snapshots", "commits", "plans", "shards"):
                proxy.fault = lambda _method, path, prefix=prefix, answer=answer: (
                    answer if "list-type" in path and f"{prefix}%2F" in path else None
                )
                with pytest.raises(expected, match=rf"s3://.*/{prefix}\b"):
                    _collect_all(store)
        proxy.fault = lambda _method, _path: None
        assert tree_digests(store) == before
    s3fs.S3FileSystem.clear_instance_cache()


def test_without_a_snapshot_nothing_is_garbage(filled: Store) -> None:
    """They may have been lost, or never published: nothing tells what is needed."""
    for path in (Path(filled.root.root) / "snapshots").iterdir():
        path.unlink()
    for path in (Path(filled.root.root) / "plans").iterdir():
        path.unlink()
    assert not find_garbage(
        filled, keep=snapshots_to_keep(filled, older_than_hours=0), older_than_hours=0
    )
    assert not find_garbage(filled, keep=(), keep_unfinished=False, older_than_hours=0)
