"""`eyas inspect`, `verify` and `gc` on a store that no recipe knows, and without its target."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.deployments.cli.terminal import ROOT, eyas_here
from tests.storage.synthetic import (
    data_key,
    fill,
    make_identity,
    make_samples,
    planned,
    tree_digests,
)
from tests.waiting import LIMIT_SECONDS

SAMPLES = make_samples(12)
WITHOUT_TORCH = """
import sys
from deployments.cli import app
try:
    app(sys.argv[1:])
finally:
    loaded = {"torch", "transformers", "prefect"} & set(sys.modules)
    assert not loaded, loaded
"""


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process and fail if it imported torch, transformers or prefect."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=LIMIT_SECONDS,
        env={**os.environ, "COLUMNS": "80"},
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with everything that can be shown: three snapshots, a plan not ended, garbage."""
    made = Store.create(str(tmp_path / "store"), make_identity())
    fill(made, SAMPLES)
    ids = [sample.sample_id for sample in SAMPLES]
    made.publish(ids)  # an earlier version, and the only one with the samples that go
    made.publish(ids[:3])
    made.publish(ids[3:10])
    made.plan(planned(make_samples(4, seed=5)), shard_tokens=60)
    return made


@pytest.mark.slow
def test_inspect_shows_what_is_there_without_torch(store: Store) -> None:
    ended = without_torch("inspect", store.root.root)
    assert ended.returncode == 0, ended.stderr
    commits = store.commits().values()
    for expected in (
        "dtype bfloat16",
        "layers 1, 5, 8 and the last (post-norm)",
        f"{len(commits)} (0 with a semantic probe)",
        f"{sum(record.num_tokens for record in commits):,} (",
        f"{sum(record.num_supervised for record in commits):,} supervised",
        "of raw)",
        "shards are missing",
    ):
        assert expected in ended.stdout
    lines = ended.stdout.splitlines()
    (latest,) = (line for line in lines if "latest snapshot" in line)
    assert store.snapshot().snapshot_id in latest
    assert all(snapshot_id in ended.stdout for snapshot_id in store.snapshot_ids())
    assert all(plan.plan_id in ended.stdout for plan in store.plans.all()[1:])


def test_inspect_goes_on_where_a_record_does_not_read(store: Store) -> None:
    shard = store.shard_ids()[0]
    store.root.publish(f"commits/{shard}.json", b"{}")
    ended = eyas_here("inspect", store.root.root)
    assert ended.returncode == 0, ended.stderr
    assert f"commits/{shard}.json" in ended.stdout
    assert "eyas verify" in ended.stdout


@pytest.mark.slow
def test_verify_of_a_sound_store_ends_well(store: Store) -> None:
    for arguments in ((), ("--deep",)):
        ended = without_torch("verify", store.root.root, *arguments)
        assert ended.returncode == 0, ended.stdout
        assert "sound" in ended.stdout


def test_verify_names_shard_object_finding_and_remedy_and_fails(store: Store) -> None:
    shard = store.shard_ids()[1]
    key = data_key(store, shard)
    path = Path(store.root.path(key))
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert eyas_here("verify", store.root.root).returncode == 0  # the size is right
    ended = eyas_here("verify", store.root.root, "--deep")
    assert ended.returncode == 1
    assert key in ended.stdout
    assert re.search(r"has \d+ bytes .*committed \d+ bytes", ended.stdout)
    assert "run: eyas repair RECIPE" in ended.stdout
    path.unlink()
    shallow = eyas_here("verify", store.root.root)
    assert shallow.returncode == 1
    assert "is missing" in shallow.stdout


@pytest.mark.slow
def test_gc_shows_and_deletes_only_with_yes(store: Store) -> None:
    before = tree_digests(store)
    shown = without_torch("gc", store.root.root, "--older-than", "0")
    assert shown.returncode == 0, shown.stderr
    assert tree_digests(store) == before
    assert "nothing was deleted; to delete it, add --yes" in shown.stdout
    gone = [line.split("│")[2].strip() for line in shown.stdout.splitlines() if "│" in line]
    assert set(gone) & set(store.shard_ids())

    deleted = eyas_here("gc", store.root.root, "--older-than", "0", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert not set(gone) & set(store.shard_ids())
    assert len(store.snapshot_ids()) == 2
    kept = set(store.shard_ids())
    ((unfinished, _),) = store.plans.unfinished()
    for plan in store.plans.all():  # what a plan has lost, nobody plans any more
        assert plan == unfinished or {shard.shard_id for shard in plan.shards} <= kept
    assert verify_store(store, deep=True) == []


def test_gc_keeps_the_named_and_drops_the_unfinished(store: Store) -> None:
    latest = store.snapshot().snapshot_id
    ended = eyas_here(
        "gc", store.root.root, "--keep", latest, "--older-than", "0", "--drop-unfinished", "--yes"
    )
    assert ended.returncode == 0, ended.stderr
    assert store.snapshot_ids() == [latest]
    assert store.plans.unfinished() == []
    wrong = eyas_here("gc", store.root.root, "--keep", "feed")
    assert wrong.returncode == 1
    assert "has no snapshot feed" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "verify", "gc"])
def test_no_store_is_one_message(command: str, tmp_path: Path) -> None:
    ended = without_torch(command, str(tmp_path / "nothing"))
    assert ended.returncode == 1
    assert "ConfigError: there is no store at" in ended.stderr
    assert "Traceback" not in ended.stderr
