"""The shards that are still to be generated: a pure function of the samples and the commits.

Samples are whole, a shard's id follows from its sample ids alone, and equal inputs give equal
plans, so that an interrupted generation resumes with exactly the shards it would have made anyway.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from storage.errors import ConfigError, CorruptError
from storage.objects.sealed_json import digest_json, seal, unseal
from storage.records.identity import FORMAT_VERSION, require_format


class Sample(Protocol):
    """A sample, with or without states; its length is in tokens."""

    @property
    def sample_id(self) -> str:
        """Its content address."""

    def __len__(self) -> int:
        """Return the number of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSample:
    """A sample that a shard is to hold."""

    sample_id: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """The samples of one shard, in the order in which it stores them."""

    shard_id: str
    sample_ids: tuple[str, ...]
    num_tokens: int

    @classmethod
    def holding(cls, samples: Sequence[Sample]) -> Self:
        """Return the shard of these samples, in this order, with the lengths they have."""
        return cls.of([PlannedSample(sample_id=s.sample_id, num_tokens=len(s)) for s in samples])

    @classmethod
    def of(cls, samples: Sequence[PlannedSample]) -> Self:
        """Return the shard of these samples, its id derived from theirs."""
        sample_ids = tuple(sample.sample_id for sample in samples)
        num_tokens = sum(sample.num_tokens for sample in samples)
        return cls(shard_id=shard_id(sample_ids), sample_ids=sample_ids, num_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The shards of one generation, persisted before the first of them is generated."""

    plan_id: str
    shards: tuple[PlannedShard, ...]

    @classmethod
    def of(cls, shards: Iterable[PlannedShard]) -> Self:
        """Return the plan of these shards, its id derived from theirs."""
        members = tuple(shards)
        plan_id = digest_json(["plan", [shard.shard_id for shard in members]])
        return cls(plan_id=plan_id, shards=members)

    def to_json(self) -> bytes:
        """Serialise as the content of `plans/<plan_id>.json`."""
        shards = [
            {"sample_ids": list(shard.sample_ids), "num_tokens": shard.num_tokens}
            for shard in self.shards
        ]
        return seal({"format_version": FORMAT_VERSION, "shards": shards})

    @classmethod
    def from_json(cls, data: bytes, *, plan_id: str) -> Self:
        """Parse a plan; raise CorruptError unless it is the plan with this id."""
        what = f"plan {plan_id}"
        document = unseal(data, what=what)
        require_format(document, what=what)
        try:
            plan = cls.of(
                PlannedShard(
                    shard_id=shard_id(tuple(shard["sample_ids"])),
                    sample_ids=tuple(shard["sample_ids"]),
                    num_tokens=shard["num_tokens"],
                )
                for shard in document["shards"]
            )
        except (KeyError, TypeError) as error:
            raise CorruptError(f"{what} has a missing or invalid field: {error!r}") from error
        if plan.plan_id != plan_id:
            raise CorruptError(f"{what} holds plan {plan.plan_id}: delete it and plan again")
        return plan


def shard_id(sample_ids: Sequence[str]) -> str:
    """Return the id of the shard that holds these samples in this order: 32 hex digits."""
    return digest_json(["shard", list(sample_ids)])


def plan_shards(
    samples: Iterable[PlannedSample],
    *,
    committed: Collection[str] = (),
    shard_tokens: int,
    pending: Iterable[PlannedShard] = (),
) -> Plan:
    """Return the shards for all samples that no committed shard holds yet.

    Shards of `pending` (from earlier, unfinished plans) are kept as they are if all their samples
    are still wanted and none is committed. The remaining samples fill shards in the given order, up
    to `shard_tokens` tokens per shard; a longer sample gets a separate shard, a duplicate counts
    once.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens is {shard_tokens}; give at least 1")
    done = frozenset(committed)
    missing = {sample.sample_id: sample for sample in samples if sample.sample_id not in done}
    kept: list[PlannedShard] = []
    for shard in pending:
        if all(sample_id in missing for sample_id in shard.sample_ids):
            kept.append(shard)
            for sample_id in shard.sample_ids:
                del missing[sample_id]
    return Plan.of([*kept, *_fill(missing.values(), shard_tokens)])


def _fill(samples: Iterable[PlannedSample], shard_tokens: int) -> Iterator[PlannedShard]:
    members: list[PlannedSample] = []
    num_tokens = 0
    for sample in samples:
        if members and num_tokens + sample.num_tokens > shard_tokens:
            yield PlannedShard.of(members)
            members, num_tokens = [], 0
        members.append(sample)
        num_tokens += sample.num_tokens
    if members:
        yield PlannedShard.of(members)
