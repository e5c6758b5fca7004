"""Small stores with states that look like a model's: heavy-tailed channels, no two rows alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from storage.encoding import zip_file as packed
from storage.encoding.shard import group_objects
from storage.errors import CorruptError
from storage.maintenance.gc import collect, find_garbage
from storage.objects.sealed_json import digest_bytes
from storage.records.commit_record import CommitRecord
from storage.records.identity import StoreIdentity
from storage.records.plan import PlannedSample
from storage.samples import StoredSample, content_id
from storage.store import Store

HIDDEN, LAYERS, VOCAB = 64, 3, 1000


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bit patterns of float32 values, truncated."""
    return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def make_sample(rng: np.random.Generator, tokens: int) -> StoredSample:
    """Return a sample of random ids, a prompt then an answer, and channel-scaled states."""
    ids = rng.integers(0, VOCAB, tokens, dtype=np.int32)
    mask = np.arange(tokens) >= tokens // 3
    scale = np.exp2(rng.normal(0, 3, HIDDEN))
    aux = rng.normal(0, 1, (tokens, LAYERS, HIDDEN)) * scale
    last = rng.normal(0, 1, (tokens, HIDDEN)) * scale
    return StoredSample(
        sample_id=content_id(ids, mask),
        input_ids=ids,
        loss_mask=mask,
        aux_hidden_states=bf16_bits(aux),
        last_hidden_state=bf16_bits(last),
        target_argmax=rng.integers(0, VOCAB, tokens, dtype=np.int32),
        target_logsumexp=rng.normal(10, 1, tokens).astype(np.float32),
    )


def make_samples(count: int, *, seed: int = 0, tokens: tuple[int, int] = (5, 60)) -> list:
    """Return `count` samples of between `tokens[0]` and `tokens[1]` tokens."""
    rng = np.random.default_rng(seed)
    return [make_sample(rng, int(rng.integers(*tokens))) for _ in range(count)]


def planned(samples: Sequence[StoredSample]) -> list[PlannedSample]:
    """Return what a plan needs to know of samples."""
    return [PlannedSample(sample_id=s.sample_id, num_tokens=len(s)) for s in samples]


def fill(store: Store, samples: Sequence[StoredSample], *, shard_tokens: int = 100) -> None:
    """Plan, write and commit every sample the store lacks."""
    by_id = {sample.sample_id: sample for sample in samples}
    plan = store.plan(planned(samples), shard_tokens=shard_tokens)
    for shard in store.plans.missing(plan):
        store.write_shard(shard, [by_id[sample_id] for sample_id in shard.sample_ids])


def make_identity(**changes: object) -> StoreIdentity:
    """Return the identity of the synthetic samples, with changes."""
    values: dict = {
        "target_fingerprint": "f" * 64,
        "target_fields": {"revision": "abc", "dtype": "bfloat16"},
        "tokenizer_fingerprint": "t" * 64,
        "template_fingerprint": "c" * 64,
        "aux_layers": (1, 5, 8),
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "norm_convention": "post_norm",
        "profile": "lossless",
    }
    return StoreIdentity(**{**values, **changes})


def tree_digests(store: Store) -> dict[str, str]:
    """Return the digest of every object below the store's root, by key.

    Every attempt at a shard has a name of its own. That of one that is committed is left out, and
    so is what was revoked, so that two stores of the same shards have the same digests.
    """
    root = store.root
    keys = [key for key in root.sizes("") if not key.startswith("revoked/")]
    found = {key: digest_bytes(root.read(key)) for key in keys}
    for shard_id in store.shard_ids():
        try:
            record = store.commit(shard_id)
        except CorruptError:
            continue
        names = {f"shards/{shard_id}/{key}": f"shards/{shard_id}/data" for key in record.objects}
        found = {names.get(key, key): digest for key, digest in found.items()}
        found[f"commits/{shard_id}.json"] = digest_bytes(nameless(record).to_json())
    return found


def nameless(record: CommitRecord) -> CommitRecord:
    """Return a record without the name of the attempt, which no two have in common."""
    (digest,) = record.objects.values()
    return replace(record, objects={"data": digest})


def nameless_commits(store: Store) -> dict[str, CommitRecord]:
    """Return what a store has committed, to be compared with another store."""
    return {shard_id: nameless(record) for shard_id, record in store.commits().items()}


def committed_samples(store: Store) -> set[str]:
    """Return the ids of all samples that some committed shard holds."""
    return {name for record in store.commits().values() for name in record.sample_ids}


def shard_sizes(store: Store) -> dict[str, int]:
    """Return the bytes below the folder of every shard, committed or not, by shard id."""
    sizes = dict.fromkeys(store.shard_ids(), 0)
    for key, num_bytes in store.root.sizes("shards").items():
        shard_id = key.partition("/")[0]
        sizes[shard_id] = sizes.get(shard_id, 0) + num_bytes
    return sizes


def data_key(store: Store, shard_id: str) -> str:
    """Return the key of the file that holds a shard."""
    (key,) = store.commit(shard_id).objects
    return f"shards/{shard_id}/{key}"


def zarr_objects(store: Store, shard_id: str) -> Mapping[str, bytes | memoryview]:
    """Return the objects of a shard's Zarr group by key."""
    objects = {data_key(store, shard_id): store.root.read(data_key(store, shard_id))}
    return group_objects(objects, shard_id=shard_id)


def change_inside(data: bytes, name: str, how: Callable[[bytes], bytes]) -> bytes:
    """Return the file of a shard with other bytes, as many, in one object of its Zarr group."""
    inside = bytes(packed.unpacked(data)[name])
    at = data.index(inside)
    assert data.count(inside) == 1
    assert len(how(inside)) == len(inside)
    return data[:at] + how(inside) + data[at + len(inside) :]


def drop_leftovers(store: Store) -> None:
    """Collect what kills and rivals left, as the command does; snapshots and shards stay."""
    garbage = find_garbage(store, keep=store.snapshot_ids(), older_than_hours=0)
    assert not garbage.snapshot_ids
    assert not garbage.shard_ids
    collect(store, garbage)


class ObjectsInMemory:
    """Where arrays are written to without a store."""

    def __init__(self) -> None:
        self.written: dict[str, bytes] = {}

    @contextmanager
    def open(self, key: str) -> Iterator[Callable[[bytes], object]]:
        pieces: list[bytes] = []
        yield pieces.append
        self.written[key] = b"".join(pieces)
