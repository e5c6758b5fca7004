"""Whatever is done to a store, killed half-way and damaged, it never loses or misreads a shard.

The model is the set of bytes that each shard must have, taken from a store that nothing ever
happened to. A shard is absent (no record), whole (record and objects are those bytes) or damaged.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from storage.errors import ConfigError, CorruptError
from storage.maintenance.gc import collect, find_garbage, snapshots_to_keep
from storage.maintenance.repair import damaged_shards
from storage.maintenance.verify import verify_store
from storage.objects.local_files import TEMPORARY_SUFFIX
from storage.objects.object_store import ObjectStore
from storage.objects.sealed_json import seal, unseal
from storage.reader import read_shard
from storage.records import compaction, keys
from storage.records.manifest import manifest_ids
from storage.records.plan import Plan, PlannedShard
from storage.samples import StoredSample, last_needed
from storage.store import Store
from tests.storage.synthetic import fill, make_identity, make_samples, planned

SAMPLES = make_samples(5, tokens=(3, 8))
BY_ID = {sample.sample_id: sample for sample in SAMPLES}
RAM = Path("/dev/shm")  # a real file system on which fsync costs nothing, where there is one

absent, whole, damaged = "absent", "whole", "damaged"


class Killed(BaseException):
    """What a kill is to the code that it ends: nothing catches it."""


class Fuse:
    """Kills at one of the operations to come, and at every later one: the process is gone."""

    def __init__(
        self, operations: int | None, meanwhile: Callable[[], object] | None = None, at: int = 0
    ) -> None:
        """Let `meanwhile`, what another process does, happen before operation number `at`."""
        self._left = operations
        self._meanwhile = meanwhile
        self._until = at

    @property
    def at_end(self) -> bool:
        """Tell whether the next operation is the last."""
        return self._left is not None and self._left <= 0

    def burn(self) -> None:
        if self.at_end:
            raise Killed
        if self._left is not None:
            self._left -= 1
        if self._meanwhile is not None and self._until <= 0:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        self._until -= 1


@dataclass(frozen=True, slots=True)
class MortalObjectStore(ObjectStore):
    """A directory whose process is killed before, within or after an operation that changes it."""

    fuse: Fuse

    @contextmanager
    def open(self, key: str) -> Iterator[Callable[[bytes], object]]:
        self.fuse.burn()
        with ObjectStore.open(self, key) as write:

            def torn(data: bytes) -> None:
                if self.fuse.at_end:
                    write(data[: len(data) // 2])  # of a file, this stays
                self.fuse.burn()
                write(data)

            yield torn
        self.fuse.burn()

    @contextmanager
    def _beside(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        self.fuse.burn()
        if self.fuse.at_end:
            ObjectStore.write(self, f"{key}.0a1b2c3d{TEMPORARY_SUFFIX}", data[: len(data) // 2])
        self.fuse.burn()
        with ObjectStore._beside(self, key, data) as names:
            yield names
        self.fuse.burn()

    def _put(self, key: str, data: bytes, *, mode: str) -> None:
        self.fuse.burn()
        ObjectStore._put(self, key, data, mode=mode)
        self.fuse.burn()

    def delete(self, key: str) -> None:
        self.fuse.burn()
        ObjectStore.delete(self, key)
        self.fuse.burn()


def nameless(raw: bytes) -> tuple[str, bytes]:
    """Return the name of the attempt in a commit record, and the record without it."""
    document = unseal(raw, what="record")
    ((attempt, digest),) = document["objects"].items()
    return attempt, seal({**document, "objects": {"": digest}})


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    if not data:
        return b"x"
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


SAME_SIZE: list[Callable[[bytes], bytes]] = [flip, lambda data: bytes(len(data))]
OTHER_SIZE: list[Callable[[bytes], bytes]] = [
    lambda data: data[:-1],
    lambda _: b"",
    lambda data: data + data,
]
fuses = st.one_of(st.none(), st.integers(0, 90))
indices = st.integers(0, 2**16)


class StoreMachine(RuleBasedStateMachine):
    """All that may happen to a store of a few shards."""

    @initialize(
        filled=st.sampled_from([True, True, False]),
        compact_from=st.sampled_from([1, 1, 2, 1000]),
        most_shards=st.sampled_from([1, 2, 50_000]),
    )
    def start(self, filled: bool, compact_from: int, most_shards: int) -> None:
        self.patches = [
            mock.patch("storage.records.compaction.COMPACT_FROM", compact_from),
            mock.patch("storage.records.compaction.MOST_SHARDS", most_shards),
            mock.patch("storage.records.compaction.SETTLE_SECONDS", -60),  # whatever the clocks say
        ]
        for patch in self.patches:
            patch.start()
        self.torn_copies: set[str] = set()
        self.url = self.make_root()
        store = Store.create(self.url, make_identity())
        self.root = store.root
        plan = store.plan(planned(SAMPLES), shard_tokens=12)
        self.shards = {shard.shard_id: shard for shard in plan.shards}
        assert len(self.shards) >= 3
        MemoryFileSystem.store.pop("/reference", None)
        untouched = Store.create("memory://reference", make_identity())
        fill(untouched, SAMPLES, shard_tokens=12)
        self.data: dict[str, bytes] = {}
        """What the file of each shard must hold."""
        self.records: dict[str, bytes] = {}
        """The commit record of each shard, but for the name of the attempt."""
        for name in self.shards:
            raw = untouched.root.read(f"commits/{name}.json")
            attempt, self.records[name] = nameless(raw)
            self.data[name] = untouched.root.read(f"shards/{name}/{attempt}")
        self.snapshots: dict[str, frozenset[str]] = {}
        """Every snapshot that was ever published, whole or by a process that was killed."""
        self.condition = dict.fromkeys(self.shards, absent)
        self.last_read: dict[str, str] = {}
        if filled:
            for shard in plan.shards:
                self.write_shard(shard, None)
            self.publish(set(BY_ID), None)

    def make_root(self) -> str:
        raise NotImplementedError

    def teardown(self) -> None:
        for patch in self.patches:
            patch.stop()

    # ---- looking, without the store's help

    def raw(self) -> dict[str, bytes]:
        return {key: self.root.read(key) for key in self.root.sizes("")}

    def named(self, shard_id: str, raw: dict[str, bytes]) -> str | None:
        """Return the key of the data that a sound record names; None if there is none."""
        try:
            attempt, record = nameless(raw[f"commits/{shard_id}.json"])
        except CorruptError:
            return None
        except KeyError:
            return self.named_by_manifest(shard_id, raw)
        return f"shards/{shard_id}/{attempt}" if record == self.records[shard_id] else None

    def named_by_manifest(self, shard_id: str, raw: dict[str, bytes]) -> str | None:
        """Return what a row of a manifest names that was not taken back; both copies may serve."""
        for key in sorted(raw):
            if not key.startswith("manifests/") or ".shards." not in key or key in self.torn_copies:
                continue
            for row in pq.read_table(io.BytesIO(raw[key])).to_pylist():
                revoked = f"revoked/{shard_id}/{row['record_id'].hex()}.json"
                if row["shard_id"].hex() == shard_id and revoked not in raw:
                    (attempt,) = json.loads(row["objects"])
                    return f"shards/{shard_id}/{attempt}"
        return None

    def bad_keys(self, shard_id: str, raw: dict[str, bytes]) -> set[str]:
        """Return what a deep verification must report of a shard with a record."""
        key = self.named(shard_id, raw)
        if key is None:
            return {f"commits/{shard_id}.json"}
        return {key} if raw.get(key) != self.data[shard_id] else set()

    def conditions(self, raw: dict[str, bytes]) -> dict[str, str]:
        found: dict[str, str] = {}
        for shard_id in self.shards:
            if f"commits/{shard_id}.json" not in raw and not self.named(shard_id, raw):
                found[shard_id] = absent
            else:
                found[shard_id] = damaged if self.bad_keys(shard_id, raw) else whole
        return found

    def seen_by_size(self, shard_id: str, raw: dict[str, bytes]) -> bool:
        return any(
            key.startswith("commits/")
            or key not in raw
            or len(raw[key]) != len(self.data[shard_id])
            for key in self.bad_keys(shard_id, raw)
        )

    def needed_keys(self, names: Collection[str], raw: dict[str, bytes]) -> dict[str, bytes | None]:
        """Return what some shards are made of: their records and the data that these name."""
        keys = {f"commits/{name}.json" for name in names}
        keys |= {key for name in names if (key := self.named(name, raw)) is not None}
        return {key: raw.get(key) for key in keys}

    def leftovers(self, raw: dict[str, bytes]) -> set[str]:
        """Return what nothing names: temporary files, and attempts at shards."""
        named = {self.named(name, raw) for name in self.shards}
        sound = {key.split("/")[1] for key in named if key is not None}
        return {
            key
            for key in raw
            if key.endswith(TEMPORARY_SUFFIX)
            or (key.startswith("shards/") and key.split("/")[1] in sound and key not in named)
        }

    def run(self, fuse: int | Fuse | None, operation: Callable[[Store], object]) -> bool:
        """Run an operation in a process that may be killed; tell whether it was not."""
        fuse = fuse if isinstance(fuse, Fuse) else Fuse(fuse)
        root = MortalObjectStore(self.root.file_system, self.root.root, fuse)
        try:
            operation(Store(root, make_identity()))
        except Killed:
            return False
        return True

    # ---- what may happen

    @rule(which=indices, fuse=fuses)
    def write(self, which: int, fuse: int | None) -> None:
        self.write_shard(self.pick_shard(which), fuse)

    def write_shard(self, shard: PlannedShard, fuse: int | None) -> None:
        raw = self.raw()
        before = self.conditions(raw)
        name = shard.shard_id
        must_write = before[name] == absent or (
            before[name] == damaged and self.seen_by_size(name, raw)
        )
        lived = self.run(
            fuse, lambda store: store.write_shard(shard, [BY_ID[i] for i in shard.sample_ids])
        )
        after = self.conditions(self.raw())
        if lived:
            assert after[name] == (whole if must_write else before[name])
        elif before[name] == damaged:
            assert after[name] in (damaged, absent, whole)
        else:
            assert after[name] in (before[name], whole)
        self.condition = {**before, name: after[name]}

    @rule(which=indices, at=st.integers(0, 40), fuse=fuses)
    def write_by_two(self, which: int, at: int, fuse: int | None) -> None:
        """Another machine writes the same shard, all of it between two steps of this one."""
        shard = self.pick_shard(which)
        name = shard.shard_id
        raw = self.raw()
        before = self.conditions(raw)[name]
        other_wrote = False

        def meanwhile() -> None:
            nonlocal other_wrote
            Store.open(self.url).write_shard(shard, [BY_ID[i] for i in shard.sample_ids])
            other_wrote = True

        lived = self.run(
            Fuse(fuse, meanwhile, at),
            lambda store: store.write_shard(shard, [BY_ID[i] for i in shard.sample_ids]),
        )
        after = self.conditions(self.raw())[name]
        if lived or other_wrote:
            unseen = before == damaged and not self.seen_by_size(name, raw)
            assert after == (damaged if unseen else whole)
        else:
            assert after in (before, whole)
        self.condition[name] = after

    @rule(
        keys=st.lists(indices, min_size=1, max_size=2), how=st.sampled_from(SAME_SIZE + OTHER_SIZE)
    )
    def damage(self, keys: list[int], how: Callable[[bytes], bytes]) -> None:
        for key in filter(None, map(self.pick_key, keys)):
            self.root.write(key, how(self.root.read(key)))
        self.condition = self.conditions(self.raw())

    @rule(which=indices)
    def delete(self, which: int) -> None:
        key = self.pick_key(which)
        if key:
            self.root.delete(key)
            self.condition = self.conditions(self.raw())

    @rule(which=indices, records=st.booleans())
    def swap(self, which: int, records: bool) -> None:
        first, second = self.pick_shard(which).shard_id, self.pick_shard(which + 1).shard_id
        raw = self.raw()
        pair = (self.named(first, raw), self.named(second, raw))
        if records:
            pair = (f"commits/{first}.json", f"commits/{second}.json")
        if pair[0] in raw and pair[1] in raw:
            self.root.write(pair[0], raw[pair[1]])
            self.root.write(pair[1], raw[pair[0]])
            self.condition = self.conditions(self.raw())

    @rule(fuse=fuses)
    def compact(self, fuse: int | None) -> None:
        """Records go into manifests, and those that are there already go."""
        before = self.raw()
        try:
            lived = self.run(fuse, lambda store: store.compact())
        except CorruptError:
            assert damaged in self.condition.values()
            return
        after = self.raw()
        assert self.conditions(after) == self.condition
        if lived and before == after:
            alone = [key for key in after if key.startswith("commits/") and key.endswith(".json")]
            assert len(alone) < compaction.COMPACT_FROM or len(alone) < len(self.shards)

    @rule(which=indices)
    def tear_a_manifest(self, which: int) -> None:
        """Of one of its two copies only: both at once are a loss that nothing hides.

        A kill may leave its samples alone: without its shards it is not a manifest yet.
        """
        written = manifest_ids(self.root)
        keys = sorted(
            key
            for key in self.raw()
            if key.startswith("manifests/") and key.rpartition("/")[2].partition(".")[0] in written
        )
        if keys:
            key = keys[which % len(keys)]
            twin = (
                key.replace("manifests/copies/", "manifests/")
                if "/copies/" in key
                else key.replace("manifests/", "manifests/copies/")
            )
            if twin in keys and not {key, twin} & self.torn_copies:
                self.root.write(key, flip(self.root.read(key)))
                self.torn_copies.add(key)

    @rule()
    def mend_manifests(self) -> None:
        Store.open(self.url).mend_manifests()
        self.torn_copies.clear()

    @rule(which=indices)
    def leave_stale_files(self, which: int) -> None:
        name = self.pick_shard(which).shard_id
        self.root.write(f"commits/{name}.json{TEMPORARY_SUFFIX}", b"half a rec")
        self.root.write(f"shards/{name}/0123456789abcdef.zarr.zip", b"half a shard")

    @rule(fuse=fuses)
    def repair(self, fuse: int | None) -> None:
        store = Store.open(self.url)
        found = damaged_shards(store, verify_store(store, deep=True))
        plan = Plan.of(found)
        is_new = not self.root.exists(f"plans/{plan.plan_id}.json")
        if not self.run(fuse, lambda store: store.plans.save(plan)):
            return
        for shard in found:
            lived = self.run(fuse, lambda store, shard=shard: store.revoke(shard.shard_id))
            self.condition = self.conditions(self.raw())
            if not lived:
                return
            self.write_shard(shard, fuse)
        if is_new and fuse is None:
            self.root.delete(f"plans/{plan.plan_id}.json")
        if fuse is None:
            assert damaged not in self.condition.values()
            for snapshot_id in store.snapshot_ids():
                reader = store.reader(store.snapshot(snapshot_id))
                for index in range(len(reader)):
                    self.require_equal(reader.fetch(index))

    @rule(of=st.sets(indices, min_size=1, max_size=3), fuse=st.none() | st.integers(0, 6))
    def publish_some(self, of: set[int], fuse: int | None) -> None:
        """Choose among the samples of committed shards, and now and then among all."""
        names = [name for name in sorted(self.shards) if self.condition[name] != absent]
        committed = [i for name in names for i in self.shards[name].sample_ids]
        choice = sorted(BY_ID) if min(of) % 8 == 0 or not committed else committed
        self.publish({choice[which % len(choice)] for which in of}, fuse)

    def publish(self, members: set[str], fuse: int | None) -> None:
        raw = self.raw()
        records_bad = any(
            self.bad_keys(name, raw) == {f"commits/{name}.json"}
            for name, condition in self.condition.items()
            if condition != absent
        )
        missing = any(
            self.condition[name] == absent and members & set(shard.sample_ids)
            for name, shard in self.shards.items()
        )
        before = set(Store.open(self.url).snapshot_ids())
        try:
            lived = self.run(fuse, lambda store: store.publish(members))
        except CorruptError:
            assert records_bad
            return
        except ConfigError:
            assert missing
            return
        assert not lived or not (records_bad or missing)
        store = Store.open(self.url)
        for snapshot_id in set(store.snapshot_ids()) - before:
            self.snapshots[snapshot_id] = frozenset(members)
        if lived:
            assert self.members(store, store.snapshot().snapshot_id) == members

    @rule(others=st.sets(indices, max_size=2), fuse=fuses)
    def collect_garbage(self, others: set[int], fuse: int | None) -> None:
        store = Store.open(self.url)
        present = store.snapshot_ids()
        if not present or not self.root.exists(keys.LATEST):
            return
        keep = {present[which % len(present)] for which in others}
        keep.add(store.snapshot().snapshot_id)
        needed = {shard for name in keep for shard in store.snapshot(name).shard_ids}
        raw = self.raw()
        before = self.condition
        self.run(
            fuse, lambda store: collect(store, find_garbage(store, keep=keep, older_than_hours=0))
        )
        remaining = self.raw()
        self.condition = self.conditions(remaining)
        assert keep <= set(store.snapshot_ids())
        assert self.needed_keys(needed, raw) == self.needed_keys(needed, remaining)
        for name in self.shards.keys() - needed:
            assert self.condition[name] in (before[name], absent)
        if fuse is None:
            assert set(store.snapshot_ids()) == keep
            assert self.leftovers(remaining) == set()

    @rule(split=st.sampled_from(["a-train", "b-train"]), which=indices)
    def name_a_snapshot(self, split: str, which: int) -> None:
        """Two data sets in one store; each is published again now and then."""
        store = Store.open(self.url)
        if store.snapshot_ids():
            store.refs.set(split, store.snapshot_ids()[which % len(store.snapshot_ids())])

    @rule(run=st.sampled_from(["one", "two"]))
    def end_a_run(self, run: str) -> None:
        Store.open(self.url).refs.release_all(run)

    @rule(run=st.sampled_from(["one", "two"]), which=indices, fuse=st.none() | st.integers(0, 6))
    def publish_while_a_run_learns(self, run: str, which: int, fuse: int | None) -> None:
        """The data set grows between the interrupt of a run and its resume."""
        store = Store.open(self.url)
        if not store.snapshot_ids():
            return
        begun = store.snapshot_ids()[which % len(store.snapshot_ids())]
        store.refs.hold(run, begun)
        committed = [name for name in sorted(self.shards) if self.condition[name] != absent]
        more = {i for name in committed for i in self.shards[name].sample_ids}
        self.publish(self.members(store, begun) | more, fuse)

    @rule(fuse=fuses)
    def collect_what_nothing_needs(self, fuse: int | None) -> None:
        """As the command does; what is named, held or unfinished loses nothing, killed or not."""
        store = Store.open(self.url)
        if not store.snapshot_ids() or not self.root.exists(keys.LATEST):
            return
        refs = store.refs
        wanted = {store.snapshot().snapshot_id, *refs.names().values()}
        wanted |= {snapshot_id for _, snapshot_id in refs.held()}
        wanted &= set(store.snapshot_ids())
        names, held = refs.names(), refs.held()
        needed = {shard for name in wanted for shard in store.snapshot(name).shard_ids}
        published = {s for name in store.snapshot_ids() for s in self.members(store, name)}
        unpublished = {
            name
            for plan in store.plans.all()
            for shard in plan.shards
            for name in [shard.shard_id]
            if not set(shard.sample_ids) <= published
        }
        before = self.raw()

        def as_the_command_does(store: Store) -> None:
            collect(
                store,
                find_garbage(
                    store, keep=snapshots_to_keep(store, older_than_hours=0), older_than_hours=0
                ),
            )

        self.run(fuse, as_the_command_does)
        after = self.raw()
        self.condition = self.conditions(after)
        assert wanted <= set(store.snapshot_ids())
        assert (refs.names(), refs.held()) == (names, held)
        assert self.needed_keys(needed | unpublished, before) == self.needed_keys(
            needed | unpublished, after
        ), "what is needed is as it was"

    @rule(which=indices)
    def read(self, which: int) -> None:
        store = Store.open(self.url)
        if not store.snapshot_ids():
            return
        snapshot = store.snapshot(store.snapshot_ids()[which % len(store.snapshot_ids())])
        reader = store.reader(snapshot)
        for index in range(len(reader)):
            lies_in = snapshot.shard_ids[snapshot.groups[index]]
            try:
                found = reader.fetch(index)
            except CorruptError:
                assert self.condition[lies_in] != whole
            else:
                assert self.condition[lies_in] == whole
                self.require_equal(found)

    # ---- what must hold

    @invariant()
    def nothing_changed_unseen(self) -> None:
        assert self.conditions(self.raw()) == self.condition

    @invariant()
    def verification_finds_every_damage_and_nothing_else(self) -> None:
        store, raw = Store.open(self.url), self.raw()
        expected: set[str] = set()
        by_size: set[str] = set()
        for name, condition in self.condition.items():
            if condition == damaged:
                expected |= self.bad_keys(name, raw)
                by_size |= {name} if self.seen_by_size(name, raw) else set()
        needed = {s for name in store.snapshot_ids() for s in store.snapshot(name).shard_ids}
        missing = {f"commits/{s}.json" for s in needed if self.condition[s] == absent}
        latest_missing = {keys.LATEST} if store.snapshot_ids() and keys.LATEST not in raw else set()
        deep = {finding.object_key for finding in verify_store(store, deep=True)}
        assert deep == expected | missing | latest_missing | self.torn_copies & raw.keys()
        quick = {finding.shard_id for finding in verify_store(store, deep=False)} - {None}
        assert quick == by_size | {s for s in needed if self.condition[s] == absent}

    @invariant()
    def what_is_visible_is_whole_or_refused(self) -> None:
        store = Store.open(self.url)
        for name in store.snapshot_ids():
            assert self.members(store, name) == self.snapshots[name]
        assert store.shard_ids() == sorted(
            name for name, condition in self.condition.items() if condition != absent
        )
        for name, condition in self.condition.items():
            if condition == whole == self.last_read.get(name):
                continue  # the very bytes that were read before
            self.last_read[name] = condition
            try:
                shard = read_shard(store.log, name, identity=store.identity)
            except CorruptError:
                assert condition != whole
            else:
                assert condition == whole
                for position in range(len(shard.sample_ids)):
                    self.require_equal(shard.sample(position))

    @staticmethod
    def require_equal(found: StoredSample) -> None:
        expected = BY_ID[found.sample_id]
        for name in ("input_ids", "loss_mask", "aux_hidden_states", "target_logsumexp"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        kept = last_needed(expected.loss_mask)
        np.testing.assert_array_equal(
            found.last_hidden_state[kept], expected.last_hidden_state[kept]
        )

    @staticmethod
    def members(store: Store, snapshot_id: str) -> set[str]:
        snapshot = store.snapshot(snapshot_id)
        return {snapshot.sample_id(index) for index in range(snapshot.num_samples)}

    def pick_shard(self, which: int) -> PlannedShard:
        return self.shards[sorted(self.shards)[which % len(self.shards)]]

    def pick_key(self, which: int) -> str | None:
        """Return an object of a committed shard, its record now and then, if there is one."""
        names = sorted(name for name, state in self.condition.items() if state != absent)
        if not names:
            return None
        name = names[which % len(names)]
        keys = [self.named(name, self.raw()), f"commits/{name}.json"]
        key = keys[which // len(names) % len(keys)]
        return key if key is not None and self.root.exists(key) else None


class OnDisk(StoreMachine):
    def make_root(self) -> str:
        self.folder = tempfile.mkdtemp(prefix="eyas-", dir=RAM if RAM.is_dir() else None)
        return f"{self.folder}/store"

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder, ignore_errors=True)


class InMemory(StoreMachine):
    def make_root(self) -> str:
        MemoryFileSystem.store.clear()
        return "memory://machine"


TestOnDisk = OnDisk.TestCase
TestInMemory = InMemory.TestCase
TestOnDisk.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    deadline=None,
    phases=set(Phase) - {Phase.explain},
)
TestInMemory.settings = TestOnDisk.settings
TestOnDisk.pytestmark = [pytest.mark.slow]
