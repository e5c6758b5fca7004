"""What a rank decides for the machine that it runs on."""

import resource
import socket
from pathlib import Path

import pytest

from eagle_core.draft.settings import PLAIN_DRAFT
from eagle_core.target.config import TargetConfig
from eagle_core.tracking.config import TrackingConfig
from eagle_core.training.config import TrainingConfig
from flows.workers.train_worker import TrainJob, allow_open_files, own_object_cache


def make_job(training: TrainingConfig, object_cache: Path | None = None) -> TrainJob:
    return TrainJob(
        target=TargetConfig(name="target", model="target"),
        draft=PLAIN_DRAFT,
        training=training,
        tracking=TrackingConfig(),
        title="title",
        store_root="store",
        snapshot_id="snapshot",
        held_out_tokens=Path("tokens"),
        run_path=Path("run"),
        object_cache=object_cache,
        object_cache_bytes=1000,
    )


def test_machines_that_share_a_home_share_no_object_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    several = TrainingConfig(nodes=2, rendezvous="first:29500")
    cache = Path("/home/eyas/cache/objects")
    sent = make_job(several, cache).model_dump_json()
    folders = set()
    for name in ("first", "second"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        folders.add(own_object_cache(TrainJob.model_validate_json(sent)))
    assert folders == {cache / "machine-first", cache / "machine-second"}


def test_one_machine_keeps_the_object_cache_that_it_has() -> None:
    cache = Path("/home/eyas/cache/objects")
    assert own_object_cache(make_job(TrainingConfig(num_processes=2), cache)) == cache
    several = TrainingConfig(nodes=2, rendezvous="first:29500")
    assert own_object_cache(make_job(several)) is None


def test_a_rank_may_open_as_many_files_as_the_system_allows() -> None:
    own, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(own, 512), most))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (own, most))
