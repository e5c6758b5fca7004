"""A full disk is a clear error, leaves nothing half-visible, and the same command goes on later."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests

# On real file systems of many sizes, in a mount namespace of its own that goes with the process.
FULL_DISKS = """
import json, subprocess, sys
from storage.errors import OutOfSpaceError
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, tree_digests

folder = sys.argv[1]
samples = make_samples(12)

def generate():
    store = Store.create(folder + "/store", make_identity())
    fill(store, samples)
    store.publish([sample.sample_id for sample in samples])

for size in json.loads(sys.argv[2]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        generate()
    except OutOfSpaceError as error:
        message = str(error)
    else:
        message = ""
    found = {"size": size, "message": message}
    try:
        store = Store.open(folder + "/store")
    except Exception as error:
        found["opened"] = type(error).__name__
    else:
        keys = list(store.root.sizes(""))
        found["committed"] = len(store.commits())
        found["damaged"] = [str(finding) for finding in verify_store(store, deep=True)]
        found["temporary"] = [key for key in keys if key.endswith(".tmp")]
        shards = {key.split("/")[1] for key in keys if key.startswith("shards/")}
        found["leftovers"] = sorted(shards - set(store.shard_ids()))
    subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=0", folder], check=True)
    generate()
    found["digests"] = tree_digests(Store.open(folder + "/store"))
    subprocess.run(["umount", folder], check=True)
    print(json.dumps(found), flush=True)
"""
NAMESPACE = ("unshare", "--mount", "--map-root-user")
SIZES = [f"size={kilobytes}k" for kilobytes in (4, 8, *range(24, 700, 48))]
FILES = [f"size=64m,nr_inodes={count}" for count in (2, 4, 6, *range(8, 40, 3))]


@pytest.mark.slow
def test_full_disks_lose_nothing_and_show_nothing_half(tmp_path: Path) -> None:
    require_mounts(tmp_path)
    whole = Store.create(str(tmp_path / "whole"), make_identity())
    fill(whole, make_samples(12))
    whole.publish([sample.sample_id for sample in make_samples(12)])
    expected = tree_digests(whole)

    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", FULL_DISKS, str(disk), json.dumps(SIZES + FILES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(SIZES + FILES)
    full = [one for one in found if one["message"]]
    for one in full:
        assert "no space left to write" in one["message"]
        assert "run the same command again" in one["message"]
    for one in found:
        assert one["digests"] == expected, one["size"]
        assert not one.get("temporary"), one["size"]
        assert not one.get("leftovers"), one["size"]
        assert one.get("opened") == "ConfigError" or one["damaged"] == [], one["size"]
    committed = {one.get("committed") for one in full}
    assert {None, 0, 1, 2} <= committed, "the disks were not full at all stages"


def require_mounts(folder: Path) -> None:
    """Skip the test where a file system of a small size cannot be mounted."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here to mount a small file system with")
    mount = [*NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {tried.stderr.strip()}")


LIMITED = """
import resource, sys
from storage.errors import OutOfSpaceError
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples
store = Store.create(sys.argv[1], make_identity())
samples = make_samples(4)
store.plan([], shard_tokens=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    fill(store, samples, shard_tokens=10**6)
except OutOfSpaceError as error:
    sys.exit(str(error))
"""


def test_a_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    """The nearest thing to a quota that needs no privileges."""
    root = str(tmp_path / "store")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, root], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no space left to write" in done.stderr
    assert "free space" in done.stderr
    store = Store.open(root)
    assert not store.commits()
    assert not [key for key in tree_digests(store) if key.startswith("shards/")]

    fill(store, make_samples(4), shard_tokens=10**6)
    whole = Store.create(str(tmp_path / "whole"), make_identity())
    fill(whole, make_samples(4), shard_tokens=10**6)
    assert tree_digests(store) == tree_digests(whole)
