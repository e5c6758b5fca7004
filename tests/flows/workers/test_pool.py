"""Shards made by several processes, here or on a cluster: the same bytes, one writer each."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal
from unittest import mock

import psutil
import pytest
import torch
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

import storage.errors
from eagle_core.data.config import DatasetConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.memory.free_memory import ALONE, MemoryShare
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.errors import ChildFailedError, ChildKilledError, FlowError
from flows.hidden_states import hidden_states
from flows.orchestration import task_runners as runner_module
from flows.orchestration.retry import RETRYABLE
from flows.summaries import HiddenStatesSummary
from flows.tasks.generate import generate_shards
from flows.tasks.make_shards import _Failures
from flows.workers import child_process, torchrun
from flows.workers.channel import VARIABLE
from flows.workers.child_process import Child
from flows.workers.pool import WorkerPool, gpus_in_turn, local_slots, memory_share
from flows.workers.shard_batch import ShardBatch
from storage.maintenance.verify import verify_store
from storage.store import Store
from tests.flows.trees import digests
from tests.flows.workers.talking_child import Talk
from tests.paths import ROOT
from tests.storage.seaweed import BUCKET, seaweed
from tests.storage.synthetic import nameless_commits
from tests.waiting import LIMIT_SECONDS, wait_for

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

STORE = StoreConfig(shard_tokens=400, shards_per_task=1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the home of the store lies that one process made."""
    return tmp_path_factory.mktemp("alone")


def _shard_table(target_name: str) -> list[dict[str, object]]:
    """Return the latest table of shards that the UI shows."""
    key = ArtifactFilter(key=ArtifactFilterKey(any_=[f"hidden-states-shards-{target_name}"]))
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=key)
    newest = max(artifacts, key=lambda artifact: artifact.created)
    return json.loads(newest.data) if isinstance(newest.data, str) else newest.data


def _require_made_by_two(
    one: HiddenStatesSummary, two: HiddenStatesSummary, target: TargetConfig
) -> None:
    assert two.shards_made == one.num_shards
    table = _shard_table(target.name)
    assert len(table) == two.num_shards
    assert {row["attempt"] for row in table} == {1}
    assert sum(row["tokens"] for row in table) == two.num_tokens  # type: ignore[misc]
    assert len({row["worker"] for row in table}) == 2, "each loaded the target once"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_two_workers_make_the_bytes_that_one_makes(
    tmp_path: Path, alone: Path, target: TargetConfig, dataset: DatasetConfig, kind: str
) -> None:
    one = hidden_states(target=target, dataset=dataset, store=STORE, home=str(alone))
    assert one.num_shards > 6
    runner = RunnerConfig.model_validate({"kind": kind, "num_workers": 2})

    others = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "127.0.0.1:9"}  # of a user's shell
    with mock.patch.dict(os.environ, others):
        two = hidden_states(
            target=target, dataset=dataset, store=STORE, runner=runner, home=str(tmp_path)
        )

    assert digests(Path(two.store_root)) == digests(Path(one.store_root))
    _require_made_by_two(one, two, target)


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_two_workers_share_a_store_on_s3(
    tmp_path: Path, alone: Path, target: TargetConfig, dataset: DatasetConfig, kind: str
) -> None:
    one = hidden_states(target=target, dataset=dataset, store=STORE, home=str(alone))
    runner = RunnerConfig.model_validate({"kind": kind, "num_workers": 2})
    (tmp_path / "weed").mkdir()
    with seaweed(tmp_path / "weed") as server, mock.patch.dict(os.environ):
        Secret(value=server.variables).save("pond", overwrite=True)  # type: ignore[unused-coroutine]
        remote = STORE.model_copy(update={"root": f"s3://{BUCKET}/states", "credentials": "pond"})
        two = hidden_states(
            target=target, dataset=dataset, store=remote, runner=runner, home=str(tmp_path)
        )
        stored = Store.open(two.store_root)
        assert verify_store(stored, deep=True) == []
        assert nameless_commits(stored) == nameless_commits(Store.open(one.store_root))
    _require_made_by_two(one, two, target)


def test_a_batch_that_is_tried_again_makes_only_the_rest(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    together = STORE.model_copy(update={"shards_per_task": 100})
    seen: list[int] = []

    def kill_after_two(root: Path) -> None:
        while len(seen) < 2:
            time.sleep(0.002)
            seen[:] = range(len(list(root.glob("commits/*.json"))))
        for child in psutil.Process().children():
            if "flows.workers.shard_worker" in child.cmdline():
                child.kill()

    root = tmp_path / "stores" / "tiny-facts"
    killer = threading.Thread(target=kill_after_two, args=(root,))
    killer.start()
    made = hidden_states(target=target, dataset=dataset, store=together, home=str(tmp_path))
    killer.join()

    attempts = [row["attempt"] for row in _shard_table(target.name)]
    assert len(attempts) == made.num_shards
    # How those before the kill were made is not known: their attempt never answered.
    assert 2 <= attempts.count(None) < made.num_shards
    assert attempts.count(2) == made.num_shards - attempts.count(None)


def test_a_cluster_that_repeats_a_batch_makes_nothing_twice(
    alone: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    made = hidden_states(target=target, dataset=dataset, store=STORE, home=str(alone))
    shard_ids = tuple(Store.open(made.store_root).shard_ids())
    batch = ShardBatch(
        target=target,
        store_root=made.store_root,
        plan_id="of the first time",
        shard_ids=shard_ids,
        token_files=(),
    )
    with mock.patch("flows.tasks.generate.shared_pool") as pool:
        assert generate_shards(batch) == ()
        pool.return_value.make.assert_not_called()
        pool.return_value.renew.assert_not_called()
        generate_shards(batch.model_copy(update={"shard_ids": (*shard_ids, "not-there")}))
        (rest,) = pool.return_value.make.call_args.args
        with mock.patch("flows.tasks.generate.use_credentials", return_value=True):
            generate_shards(batch)
        pool.return_value.renew.assert_called_once()
    assert rest.shard_ids == ("not-there",)


def test_a_child_whose_environment_is_outdated_is_started_anew(target: TargetConfig) -> None:
    started: list[mock.Mock] = []

    def start(*_: object, **__: object) -> mock.Mock:
        started.append(
            mock.Mock(is_idle=True, **{"request.side_effect": lambda *_, **__: iter(())})
        )
        return started[-1]

    batch = ShardBatch(target=target, store_root="s", plan_id="p", shard_ids=(), token_files=())
    with mock.patch("flows.workers.pool.Child", start):
        pool = WorkerPool([{}, {}])
        for _ in range(4):
            assert list(pool.make(batch)) == []
        assert len(started) == 2, "one for each slot"
        pool.renew()
        for child in started:
            child.close.assert_not_called()
        for _ in range(4):
            assert list(pool.make(batch)) == []
        assert len(started) == 4
        for child in started[:2]:
            child.close.assert_called_once()
        pool.close()


def test_an_error_of_a_worker_keeps_its_type_and_its_words(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    bare = target.model_copy(update={"aux_layers": (1, 2, 99)})
    with pytest.raises(ConfigError, match="99"):
        hidden_states(
            target=bare,
            dataset=dataset,
            store=STORE,
            runner=RunnerConfig(num_workers=2),
            home=str(tmp_path),
        )


def test_a_runner_whose_package_is_missing_says_what_to_install(
    target: TargetConfig,
) -> None:
    with (
        mock.patch.dict("sys.modules", {"prefect_dask": None}),
        pytest.raises(FlowError, match=r"pip install -e '\.\[dask\]'"),
        runner_module.running(RunnerConfig(kind="dask"), target, generate_shards, on_report=print),
    ):
        pass


def test_each_child_has_a_gpu_of_those_that_are_visible() -> None:
    def names(visible: str | None, num_gpus: int, num_workers: int) -> list[str]:
        places = gpus_in_turn(visible, num_gpus, num_workers)
        return [place["CUDA_VISIBLE_DEVICES"] for place in places]

    assert names(None, 4, 4) == ["0", "1", "2", "3"]
    assert names("5,GPU-7f", 2, 2) == ["5", "GPU-7f"]
    assert names("5,7", 2, 3) == ["5", "7", "5"]
    pairs = gpus_in_turn("4,5,6,7", 4, 2, each=2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in pairs] == ["4,5", "6,7"]


def test_too_few_gpus_for_tensor_parallelism_are_counted(
    target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    served = {"backend": "vllm", "tensor_parallel": 4, "device": "cuda"}
    with pytest.raises(ConfigError, match=r"2 processes with 4 GPUs each .* need 8, and"):
        local_slots(target.model_copy(update=served), 2)


def test_a_child_that_hangs_is_killed_and_one_that_talks_is_not() -> None:
    child = Child("tests.flows.workers.talking_child", environment={})
    slow = Talk(pauses=(0.4,) * 8)
    first = child.request(Talk(pauses=(0.0,)), what="the child")  # its imports take long
    assert len(list(first)) == 1
    assert len(list(child.request(slow, what="the child", inactivity_timeout_seconds=3.0))) == 8
    assert child.is_idle
    hanging = Talk(pauses=(0.1,), is_ending=False)
    lines = child.request(hanging, what="the child", inactivity_timeout_seconds=3.0)
    assert Talk.model_validate_json(next(lines)).pauses == (0.1,)
    with pytest.raises(ChildKilledError, match=r"reported nothing for 3 s.*raise runner"):
        next(lines)
    assert not child.is_idle
    child.close()


def test_a_child_that_does_not_end_when_it_is_told_to_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_process, "END_SECONDS", 0.1)
    child = Child("tests.flows.workers.talking_child", environment={})
    assert len(list(child.request(Talk(pauses=(0.0,)), what="the child"))) == 1
    os.kill(child._process.pid, signal.SIGSTOP)  # SIGTERM waits then, as for a driver that hangs
    status = psutil.Process(child._process.pid).status
    wait_for(lambda: status() == psutil.STATUS_STOPPED, what="the child to stop")
    child.close()
    assert child._process.returncode == -signal.SIGKILL


def test_a_child_that_is_ended_under_a_request_is_a_killed_one_to_who_asked() -> None:
    """As when a run is cancelled: one thread ends what another still reads from."""
    child = Child("tests.flows.workers.talking_child", environment={})
    lines = child.request(Talk(pauses=(0.0,), is_ending=False), what="the child")
    next(lines)
    child.close()
    with pytest.raises(ChildKilledError, match="the child was killed by signal 15"):
        next(lines)


def test_what_a_library_prints_goes_to_the_log_and_breaks_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="flows")
    child = Child("tests.flows.workers.talking_child", environment={})
    for _ in range(2):
        (line,) = child.request(Talk(pauses=(0.0,)), what="the child")
        assert Talk.model_validate_json(line) == Talk(pauses=(0.0,))
    child.close()
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "the child printed: printed at import\na library prints this"
    assert second == "the child printed: a library prints this"


def test_an_error_that_is_none_of_ours_is_a_failure_and_not_tried_again() -> None:
    child = Child("tests.flows.workers.talking_child", environment={})
    lines = child.request(Talk(pauses=(0.0,), error="no such argument"), what="the child")
    next(lines)
    with pytest.raises(
        ChildFailedError, match=r"(?s)the child failed: builtins.TypeError: no such .*in talk"
    ) as raised:
        next(lines)
    assert not child.is_idle
    child.close()
    assert not isinstance(raised.value, RETRYABLE)
    with pytest.raises(ChildFailedError, match=r"(?s)ended with status 1; .*No module named"):
        list(
            child_process.run_child("tests.flows.no_such_child", Talk(pauses=()), what="the child")
        )


@pytest.mark.parametrize(
    ("errors", "ends_at"),
    [
        ([storage.errors.OutOfSpaceError("full")], 1),
        ([ChildFailedError(f"shards {i}-{i} failed: TypeError\n{i}") for i in range(5)], 3),
        ([ChildKilledError("killed")] * 5, 0),
        ([ChildFailedError("one"), ChildFailedError("other")] * 2, 0),
        ([storage.errors.SampleRefusedError("sample 1 has NaN")] * 5, 0),
    ],
)
def test_equal_failures_end_a_run_though_others_succeeded(
    errors: list[Exception], ends_at: int
) -> None:
    failures = _Failures()
    ends = [failures.end_the_run(error, has_made_some=True) for error in errors]
    assert ends.index(True) + 1 == ends_at if ends_at else not any(ends)


@pytest.mark.parametrize(
    ("error", "ends_at"),
    [
        (ChildFailedError("the process of shards 0-0 failed: builtins.TypeError"), 1),
        (ConfigError("target tiny: no such layer"), 1),
        (storage.errors.ConfigError("no such block"), 1),
        (ChildKilledError("killed"), 3),
        (storage.errors.TransientError("busy"), 3),
    ],
)
def test_what_fails_for_certain_is_not_tried_again_with_other_shards(
    error: Exception, ends_at: int
) -> None:
    failures = _Failures()
    ends = [failures.end_the_run(error, has_made_some=False) for _ in range(3)]
    assert ends.index(True) + 1 == ends_at


def test_ranks_answer_through_one_channel_and_long_lines_stay_whole() -> None:
    request = Talk(pauses=(0.0,) * 50, padding="x" * 20_000)
    lines = list(
        torchrun.run_ranks(
            "tests.flows.workers.talking_ranks",
            request,
            num_ranks=3,
            environment={},
            what="the ranks",
        )
    )
    assert [Talk.model_validate_json(line) for line in lines] == [request] * 150


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access", "out of memory"])
def test_a_fault_of_the_device_is_a_kill_and_tried_again(words: str) -> None:
    child = Child("tests.flows.workers.talking_child", environment={})
    kind = MemoryError if words.rsplit(maxsplit=1)[-1] == "memory" else RuntimeError
    request = Talk(pauses=(), error=words, kind=kind.__name__)
    with pytest.raises(ChildKilledError, match=f"(?s)was killed by signal 9.*{words}"):
        list(child.request(request, what="the child"))
    child.close()


def test_a_child_whose_parent_is_gone_ends(tmp_path: Path) -> None:
    """It would wait for ever for somebody who reads."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ended = subprocess.run(
        [sys.executable, "-m", "tests.flows.workers.talking_child"],
        env={**os.environ, VARIABLE: str(pipe)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert ended.returncode == 1
    assert "No such device or address" in ended.stderr


@pytest.mark.parametrize(
    ("kind", "num_gpus", "num_workers", "per_gpu"),
    [
        ("processes", 0, 4, 1),
        ("processes", 2, 4, 2),
        ("processes", 8, 4, 1),
        ("dask", 8, 4, 4),  # its processes see all GPUs, and take the first
        ("ray", 1, 4, 1),  # gives each task a GPU of its own
    ],
)
def test_processes_share_memory_and_gpus(
    kind: Literal["processes", "dask", "ray"],
    num_gpus: int,
    num_workers: int,
    per_gpu: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr("flows.workers.pool.free_main_memory", lambda: 1000)
    target = TargetConfig(name="tiny", model="org/tiny", device="cuda" if num_gpus else "cpu")
    runner = RunnerConfig(kind=kind, num_workers=num_workers)
    share = MemoryShare(main=250, processes_per_gpu=per_gpu)
    assert memory_share(target, runner) == share
    assert memory_share(target, runner.model_copy(update={"num_workers": 1})) == ALONE
    assert memory_share(target, runner.model_copy(update={"address": "tcp://host:1"})) == ALONE
