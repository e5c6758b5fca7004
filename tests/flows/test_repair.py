"""Damage of every kind is found, named and repaired to the same bytes; what is sound is left."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eagle_core.data.config import DatasetConfig
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.stored_source import to_stored
from flows.config.store import StoreConfig
from flows.errors import DamagedStoreError
from flows.hidden_states import hidden_states
from flows.repair import repair_flow
from flows.verify import verify_flow
from flows.workspace import Workspace
from storage.errors import MismatchError
from storage.maintenance.verify import verify_store
from storage.records.plan import PlannedShard
from storage.store import Store
from tests import tiny
from tests.flows.outspoken import write_outspoken_target
from tests.flows.trees import digests
from tests.storage.synthetic import data_key, drop_leftovers, make_samples, planned

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

STORE = StoreConfig(shard_tokens=600, shards_per_task=100)


@pytest.fixture(scope="module")
def outspoken(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    """A tiny target that is sure of what it says."""
    folder = write_outspoken_target(tmp_path_factory.mktemp("outspoken"))
    return TargetConfig(
        name="tiny", model=str(folder), dtype="float32", device="cpu", batch_tokens=512
    )


@pytest.fixture(scope="module")
def facts(conversations_path: Path) -> DatasetConfig:
    """The small data set."""
    return DatasetConfig(
        name="facts", source=str(conversations_path), held_out_fraction=0.2, max_length=256
    )


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    outspoken: TargetConfig,
    facts: DatasetConfig,
    prefect_server: str,  # noqa: ARG001 (the flow needs it)
) -> Path:
    """A home folder with a sound store; not to be changed."""
    home = tmp_path_factory.mktemp("whole")
    hidden_states(target=outspoken, dataset=facts, store=STORE, home=str(home))
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "home"))


def _root(home: Path) -> Path:
    return Workspace(home=home, target="tiny", dataset="facts").store_root


def _shard(root: Path, index: int) -> str:
    return sorted(path.stem for path in (root / "commits").iterdir())[index]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _data(root: Path, shard: str) -> Path:
    return root / data_key(Store.open(str(root)), shard)


def _flip_one_bit(root: Path) -> set[str]:
    shard = _shard(root, 0)
    _flip(_data(root, shard))
    return {shard}


def _lose_an_object(root: Path) -> set[str]:
    shard = _shard(root, 1)
    _data(root, shard).unlink()
    return {shard}


def _garble_a_record(root: Path) -> set[str]:
    shard = _shard(root, 2)
    _flip(root / "commits" / f"{shard}.json")
    return {shard}


def _lose_two_records(root: Path) -> set[str]:
    shards = {_shard(root, 0), _shard(root, -1)}
    for shard in shards:
        (root / "commits" / f"{shard}.json").unlink()
    return shards


def _swap_two_shards(root: Path) -> set[str]:
    shards = {_shard(root, 0), _shard(root, 1)}
    first, second = (_data(root, shard) for shard in sorted(shards))
    first.rename(root / "aside")
    second.rename(first)
    (root / "aside").rename(second)
    return shards


def _garble_the_latest_snapshot(root: Path) -> set[str]:
    path = root / "snapshots" / f"{Store.open(str(root)).snapshot().snapshot_id}.parquet"
    content = bytearray(path.read_bytes())  # a single bit may be one that Parquet does not read
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    path.write_bytes(content)
    return set()


def _garble_the_name_of_the_latest(root: Path) -> set[str]:
    _flip(root / "snapshots" / "latest.json")
    return set()


def _lose_the_name_of_the_latest(root: Path) -> set[str]:
    (root / "snapshots" / "latest.json").unlink()
    return set()


@pytest.mark.parametrize(
    "damage",
    [
        _flip_one_bit,
        _lose_an_object,
        _garble_a_record,
        _lose_two_records,
        _swap_two_shards,
        _garble_the_latest_snapshot,
        _garble_the_name_of_the_latest,
        _lose_the_name_of_the_latest,
    ],
)
def test_repair_makes_what_is_damaged_again_with_the_same_bytes(
    home: Path, outspoken: TargetConfig, facts: DatasetConfig, damage: Callable[[Path], set[str]]
) -> None:
    root = _root(home)
    before = digests(root)
    shards = damage(root)
    with pytest.raises(DamagedStoreError, match="eyas repair tiny"):
        verify_flow(target=outspoken, dataset=facts, home=str(home))

    repaired = repair_flow(target=outspoken, dataset=facts, store=STORE, home=str(home))

    assert set(repaired.remade) == shards
    assert repaired.left == ()
    drop_leftovers(Store.open(str(root)))  # without its record nobody knows whose data it was
    assert digests(root) == before
    assert verify_flow(target=outspoken, dataset=facts, home=str(home)).findings == ()


def test_a_sound_store_is_left_alone(
    home: Path,
    outspoken: TargetConfig,
    facts: DatasetConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in _root(home).rglob("*")}
    repaired = repair_flow(target=outspoken, dataset=facts, store=STORE, home=str(home))
    assert (repaired.findings, repaired.remade) == ((), ())
    assert "there was nothing to repair" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in _root(home).rglob("*")} == stamps


def test_states_that_do_not_say_what_the_target_said_are_made_again(
    home: Path, outspoken: TargetConfig, facts: DatasetConfig
) -> None:
    root = _root(home)
    before = digests(root)
    store = Store.open(str(root))
    shard_id = _wrong_states(store, home, outspoken)
    assert verify_store(store, deep=True) == []
    assert not verify_flow(target=outspoken, dataset=facts, home=str(home), deep=False).findings
    with pytest.raises(DamagedStoreError, match=f"{shard_id}.*log-probability"):
        verify_flow(target=outspoken, dataset=facts, home=str(home))
    repaired = repair_flow(target=outspoken, dataset=facts, store=STORE, home=str(home))
    assert repaired.remade == (shard_id,)
    drop_leftovers(store)  # the right states, which the wrong ones had replaced
    assert digests(root) == before


def _wrong_states(store: Store, home: Path, target: TargetConfig) -> str:
    """Commit states of another layer under the probe of the right ones."""
    record = store.commit(store.shard_ids()[0])
    wanted = [
        sample
        for path in sorted((home / "tokens").rglob("*.arrow"))
        for file in [TokenFile(path)]
        for sample in file.by_id([name for name in record.sample_ids if name in file])
    ]
    states = [to_stored(state) for state in capture_states(TargetModel.load(target), wanted)]
    for state in states:
        state.last_hidden_state[:] = state.aux_hidden_states[:, -1]
    shard = PlannedShard(
        shard_id=record.shard_id, sample_ids=record.sample_ids, num_tokens=record.num_tokens
    )
    store.revoke(record.shard_id)
    store.write_shard(shard, states, probe=record.probe)
    return record.shard_id


def test_an_interrupted_repair_is_ended_by_the_next_one(
    home: Path, outspoken: TargetConfig, facts: DatasetConfig
) -> None:
    root = _root(home)
    before = digests(root)
    for path in (root / "plans").iterdir():
        path.unlink()  # so that only the repair's own plan knows what the shard held
    shard = _shard(root, 0)
    _flip(root / "commits" / f"{shard}.json")
    broken = outspoken.model_copy(update={"batch_tokens": 512, "device": "cuda:7"})
    with pytest.raises(Exception, match=r"CUDA|cuda"):
        repair_flow(target=broken, dataset=facts, store=STORE, home=str(home))
    repair_flow(target=outspoken, dataset=facts, store=STORE, home=str(home))
    drop_leftovers(Store.open(str(root)))
    found = digests(root)
    assert {name: found[name] for name in found if not name.startswith("plans")} == {
        name: before[name] for name in before if not name.startswith("plans")
    }


def test_a_damaged_plan_is_dropped(
    home: Path, outspoken: TargetConfig, facts: DatasetConfig
) -> None:
    root = _root(home)
    (plan,) = (root / "plans").iterdir()
    _flip(plan)
    repaired = repair_flow(target=outspoken, dataset=facts, store=STORE, home=str(home))
    assert [finding.object_key for finding in repaired.findings] == [f"plans/{plan.name}"]
    assert not plan.exists()
    assert verify_flow(target=outspoken, dataset=facts, home=str(home)).findings == ()


def test_a_shard_of_other_data_is_named_and_not_taken_back(
    home: Path, tmp_path: Path, outspoken: TargetConfig, facts: DatasetConfig
) -> None:
    root = _root(home)
    other = DatasetConfig(
        name="other",
        source=str(tiny.write_conversations(tmp_path / "other.json", 4, first=500)),
        held_out_fraction=0.0,
        max_length=256,
    )
    shared = STORE.model_copy(update={"root": str(root)})
    known = set(Store.open(str(root)).shard_ids())
    hidden_states(target=outspoken, dataset=other, store=shared, home=str(home))
    (foreign,) = set(Store.open(str(root)).shard_ids()) - known
    _flip(_data(root, foreign))
    ours = _flip_one_bit(root) if _shard(root, 0) != foreign else {_shard(root, 1)}

    with pytest.raises(DamagedStoreError, match=f"{foreign}.*recipe that made"):
        repair_flow(target=outspoken, dataset=facts, store=shared, home=str(home))
    store = Store.open(str(root))
    assert foreign in store.shard_ids()
    assert {finding.shard_id for finding in verify_store(store, deep=True)} == {foreign}
    assert ours <= set(store.shard_ids())
    repair_flow(target=outspoken, dataset=other, store=shared, home=str(home))
    assert verify_store(store, deep=True) == []


def test_the_store_of_another_target_is_refused_by_name(
    home: Path, tmp_path: Path, outspoken: TargetConfig, facts: DatasetConfig
) -> None:
    other = outspoken.model_copy(
        update={"model": str(tiny.write_target(tmp_path / "other", seed=5))}
    )
    with pytest.raises(MismatchError, match="target weights"):
        verify_flow(target=other, dataset=facts, home=str(home))


def test_unknown_plans_of_synthetic_samples_stay(
    home: Path, outspoken: TargetConfig, facts: DatasetConfig
) -> None:
    """A repair ends its own plan only: another's unfinished one is not dropped."""
    root = _root(home)
    store = Store.open(str(root))
    plan = store.plan(planned(make_samples(3)), shard_tokens=100)
    _flip_one_bit(root)
    repair_flow(target=outspoken, dataset=facts, store=STORE, home=str(home))
    assert store.plans.load(plan.plan_id) == plan
