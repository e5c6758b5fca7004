"""Every kind of damage in every place, and who finds it.

| damage                             | quick verification | deep verification | reader  |
| ---------------------------------- | ------------------ | ----------------- | ------- |
| bit flip, zeroed, record re-sealed | no                 | finds             | refuses |
| truncated, emptied, grown, deleted | finds              | finds             | refuses |
| record deleted                     | finds (1)          | finds (1)         | refuses |
| two shards swapped                 | by size if it can  | finds             | refuses |
| two records swapped                | finds              | finds             | refuses |
| two samples of equal length swapped| no (2)             | finds             | refuses |
| samples swapped, then digested     | no                 | no (3)            | refuses |
| old record, its data collected     | finds              | finds             | refuses |
| old record over new data           | no damage (4)      | no damage (4)     | reads   |
| stale temporary                    | no damage          | no damage         | reads   |

1: if a snapshot needs the shard; else the shard is planned again.
2: unless the new order compresses to another size.
3: the bytes are what was committed; the content id of each sample is checked when it is read.
4: every attempt has a name of its own, so the old data still lies where the old record says.
States swapped without their tokens are what the semantic probe is for (`test_probe.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest

from storage.encoding import zip_file as packed
from storage.encoding.shard import write_arrays
from storage.errors import CorruptError
from storage.maintenance.verify import verify_store
from storage.objects.digests import ObjectDigest
from storage.objects.sealed_json import seal, unseal
from storage.samples import StoredSample
from storage.store import Store
from tests.storage.steps import SteppedObjectStore
from tests.storage.synthetic import (
    change_inside,
    data_key,
    fill,
    make_identity,
    make_samples,
    tree_digests,
)

STATES = "aux_hidden_states_mantissas/c.0.0.0"
SMALL = "target_logsumexp/c.0"


@dataclass(frozen=True)
class Victim:
    """A published store of two shards of two samples each, all of 12 tokens."""

    store: Store
    samples: list[StoredSample]

    @property
    def first(self) -> str:
        return self.store.shard_ids()[0]

    @property
    def second(self) -> str:
        return self.store.shard_ids()[1]

    @property
    def first_samples(self) -> list[StoredSample]:
        by_id = {sample.sample_id: sample for sample in self.samples}
        return [by_id[sample_id] for sample_id in self.store.commit(self.first).sample_ids]

    def change(self, key: str, how: Callable[[bytes], bytes]) -> None:
        self.store.root.write(key, how(self.store.root.read(key)))

    def swap(self, one: str, other: str) -> None:
        root = self.store.root
        kept, replacement = root.read(one), root.read(other)
        root.write(one, replacement)
        root.write(other, kept)

    def read_all(self) -> None:
        reader = self.store.reader(self.store.snapshot())
        expected = {sample.sample_id: sample for sample in self.samples}
        for index in range(len(reader)):
            found = reader.fetch(index)
            states = expected[found.sample_id].aux_hidden_states
            assert found.aux_hidden_states.tobytes() == states.tobytes()


@pytest.fixture(scope="module")
def healthy(lasting_root: str) -> tuple[Victim, dict[str, bytes]]:
    """Return a store in each place, and all that it holds."""
    store = Store.create(lasting_root, make_identity())
    samples = make_samples(4, tokens=(12, 13))
    fill(store, samples, shard_tokens=24)
    store.publish([sample.sample_id for sample in samples])
    assert len(store.shard_ids()) == 2
    assert verify_store(store, deep=True) == []
    victim = Victim(store, samples)
    victim.read_all()
    return victim, {key: store.root.read(key) for key in store.root.sizes("")}


@pytest.fixture
def victim(healthy: tuple[Victim, dict[str, bytes]]) -> Iterator[Victim]:
    """Yield a healthy store and heal it afterwards."""
    found, whole = healthy
    touched: set[str] = set()

    @contextmanager
    def step(operation: str) -> Iterator[None]:
        kind, _, key = operation.partition(" ")
        if kind in ("write", "delete"):
            touched.add(key)
        yield

    root = SteppedObjectStore.over(found.store.root, step)
    yield Victim(Store(root, found.store.identity), found.samples)
    for key in touched:
        if key in whole:
            found.store.root.write(key, whole[key])
        else:
            found.store.root.delete(key)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def swap_shards(victim: Victim) -> None:
    victim.swap(data_key(victim.store, victim.first), data_key(victim.store, victim.second))


def swap_samples(victim: Victim, *, digest: bool) -> None:
    """Store each sample of a shard under the other's id, and perhaps a record that fits that."""
    one, two = victim.first_samples
    mixed = [replace(two, sample_id=one.sample_id), replace(one, sample_id=two.sample_id)]
    pieces: list[bytes] = []
    with packed.packing(pieces.append) as open_object:
        write_arrays(victim.first, mixed, victim.store.identity, open_object)
    data = b"".join(pieces)
    record = victim.store.commit(victim.first)
    victim.store.root.write(data_key(victim.store, victim.first), data)
    if digest:
        digests = dict.fromkeys(record.objects, ObjectDigest.of(data))
        victim.store.root.write(
            f"commits/{victim.first}.json", replace(record, objects=digests).to_json()
        )


def put_old_record_over_new_data(victim: Victim) -> str:
    """Return the key of the data that the old record names."""
    key, data = f"commits/{victim.first}.json", data_key(victim.store, victim.first)
    old = victim.store.root.read(key)
    victim.store.revoke(victim.first)
    new = [replace(s, target_logsumexp=s.target_logsumexp * 2) for s in victim.samples]
    fill(victim.store, new, shard_tokens=24)
    assert verify_store(victim.store, deep=True) == []
    victim.store.root.write(key, old)
    return data


def collect_data_of_old_record(victim: Victim) -> None:
    victim.store.root.delete(put_old_record_over_new_data(victim))


def reseal_with_another_digest(victim: Victim) -> None:
    """Damage a record as nothing but intent can: its seal fits."""

    def change(data: bytes) -> bytes:
        document = unseal(data, what="record")
        ((key, (num_bytes, digest)),) = document["objects"].items()
        document["objects"][key] = [num_bytes, flip(digest.encode()).hex()[:32]]
        return seal(document)

    victim.change(f"commits/{victim.first}.json", change)


@dataclass(frozen=True)
class Damage:
    """Something that happens to a store, and who finds it: always deep verification or reader."""

    apply: Callable[[Victim], None]
    quick: bool | None
    """None where it depends on sizes."""
    deep: bool = True


def to_data(how: Callable[[bytes], bytes], *, quick: bool) -> Damage:
    return Damage(
        lambda victim: victim.change(data_key(victim.store, victim.first), how), quick=quick
    )


def inside(name: str, how: Callable[[bytes], bytes]) -> Damage:
    return to_data(lambda data: change_inside(data, name, how), quick=False)


def to_record(how: Callable[[bytes], bytes]) -> Damage:
    return Damage(lambda victim: victim.change(f"commits/{victim.first}.json", how), quick=True)


MATRIX: dict[str, Damage] = {
    "bit flip in states": inside(STATES, flip),
    "bit flip in tokens": inside(SMALL, flip),
    "bit flip in metadata": inside("zarr.json", flip),
    "zeroed states": inside(STATES, lambda data: bytes(len(data))),
    "zeroed": to_data(lambda data: bytes(len(data)), quick=False),
    "truncated": to_data(lambda data: data[:-1], quick=True),
    "emptied": to_data(lambda _: b"", quick=True),
    "grown": to_data(lambda data: data + b"\0", quick=True),
    "deleted": Damage(lambda v: v.store.root.delete_all(f"shards/{v.first}"), quick=True),
    "bit flip in record": to_record(flip),
    "truncated record": to_record(lambda data: data[:-1]),
    "emptied record": to_record(lambda _: b""),
    "zeroed record": to_record(lambda data: bytes(len(data))),
    "record deleted": Damage(lambda v: v.store.revoke(v.first), quick=True),
    "record re-sealed": Damage(reseal_with_another_digest, quick=False),
    "two shards swapped": Damage(swap_shards, quick=None),
    "two records swapped": Damage(
        lambda v: v.swap(f"commits/{v.first}.json", f"commits/{v.second}.json"), quick=True
    ),
    "two samples swapped": Damage(lambda v: swap_samples(v, digest=False), quick=None),
    "two samples swapped, then digested": Damage(
        lambda v: swap_samples(v, digest=True), quick=False, deep=False
    ),
    "old record, its data collected": Damage(collect_data_of_old_record, quick=True),
}


@pytest.mark.parametrize("damage", MATRIX.values(), ids=list(MATRIX))
def test_damage_is_found_and_never_read(victim: Victim, damage: Damage) -> None:
    first = victim.first
    damage.apply(victim)
    quick = {finding.shard_id for finding in verify_store(victim.store, deep=False)}
    deep = {finding.shard_id for finding in verify_store(victim.store, deep=True)}
    if damage.quick is not None:
        assert (first in quick) is damage.quick
    assert (first in deep) is damage.deep
    assert quick <= deep
    with pytest.raises(CorruptError, match=f"{first}.*eyas repair"):
        victim.read_all()


def test_an_old_record_still_has_its_data(victim: Victim) -> None:
    put_old_record_over_new_data(victim)
    assert verify_store(victim.store, deep=True) == []
    victim.read_all()


def test_stale_temporaries_are_no_damage(victim: Victim) -> None:
    whole = tree_digests(victim.store)
    stale = {
        f"commits/{victim.first}.json.0a1b2c3d.tmp": b"half a rec",
        f"shards/{victim.first}/0123456789abcdef.zarr.zip": b"half a shard",
        f"snapshots/{victim.store.snapshot().snapshot_id}.parquet.tmp": b"PAR1",
        "snapshots/latest.json.tmp": b"{",
        "plans/0.json.tmp": b"",
    }
    for key, data in stale.items():
        victim.store.root.write(key, data)
    assert verify_store(victim.store, deep=True) == []
    assert victim.store.plans.unfinished() == []
    assert len(victim.store.snapshot_ids()) == 1
    victim.read_all()
    assert {k: v for k, v in tree_digests(victim.store).items() if k not in stale} == whole
