"""Table rows about stores, for `plan`, `inspect`, `verify`, `repair` and `gc`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.reports.cost import CostEstimate, PlacementCost, RecomputeCost
from flows.reports.inspection import SnapshotFigures, StoreFigures
from flows.reports.store_summaries import RepairSummary, ShardResult, VerifySummary
from flows.reports.table import Row
from flows.reports.units import human_bytes, human_seconds
from storage.maintenance.gc import Garbage
from storage.records.identity import StoreIdentity
from storage.records.presence import Finding
from storage.store import Store

MOST_LISTED = 20
MOST_IN_TABLE = 1000
_SKETCHED = "not here: sizes are from config.json and the shares that SmolLM2's states take"
_SKETCHED_TIME = (
    "; the time is that of one layer of each kind with random weights, by transformers, or of "
    "reading weights at 2 GB per second; writing states is not counted"
)
_COUNTED_WHOLE = "; the weights are quantized, but counted as if they were not"


def cost_rows(estimate: CostEstimate) -> list[Row]:
    """Return what is missing and what it would cost under each profile."""
    rows = [
        ("samples", f"{estimate.num_samples:,}"),
        ("tokens", f"{estimate.num_tokens:,} ({estimate.num_supervised_tokens:,} supervised)"),
        ("store", estimate.store_root),
    ]
    if estimate.stored_bytes:
        rows.append(("already stored", human_bytes(estimate.stored_bytes)))
    if not estimate.missing_tokens:
        return [*rows, ("missing", "nothing: every sample has its states")]
    rows.append(("missing", f"{estimate.missing_tokens:,} tokens, {estimate.num_shards:,} shards"))
    for profile, per_token in estimate.bytes_per_token.items():
        chosen = ", chosen" if profile == estimate.profile else ""
        size = f"{human_bytes(estimate.size(profile))} ({per_token:,.0f} bytes per token{chosen})"
        rows.append((f"size as {profile}", size))
    if estimate.free_bytes is not None:
        rows.append(("free space", human_bytes(estimate.free_bytes)))
    if estimate.budget_bytes is not None:
        rows.append(("budget", human_bytes(estimate.budget_bytes)))
    if estimate.placement is not None:
        rows.append(("placement", _placement(estimate.placement)))
    if estimate.is_sketch:
        timed = _SKETCHED_TIME if estimate.tokens_per_second else ""
        counted = _COUNTED_WHOLE if estimate.counts_too_much else ""
        rows.append(("weights", f"{_SKETCHED}{timed}{counted}"))
    if estimate.recompute is not None:
        rows.append(("recompute during training", _recompute(estimate, estimate.recompute)))
    missing = estimate.missing_bytes(estimate.profile)
    return [
        *rows,
        ("time", _time(estimate)),
        ("space", f"short by {human_bytes(missing)}" if missing else "enough"),
    ]


def _time(estimate: CostEstimate) -> str:
    if not estimate.tokens_per_second:
        return f"not known: {estimate.device} has too little memory for the target"
    speed = f"{estimate.tokens_per_second:,.0f} tokens per second on {estimate.device}"
    return f"about {human_seconds(estimate.seconds)} ({speed})"


def _placement(cost: PlacementCost) -> str:
    """Return where the weights are, and what their reading costs."""
    if not cost.pass_tokens:
        return f"{cost.name} ({cost.reason})"
    passes = "1 pass" if cost.num_passes == 1 else f"{cost.num_passes:,} passes"
    return (
        f"{cost.name}, one layer at a time: {passes} of up to {cost.pass_tokens:,} tokens, "
        f"{human_bytes(cost.read_bytes)} of weights read ({cost.reason})"
    )


def _recompute(estimate: CostEstimate, cost: RecomputeCost) -> str:
    """Return the cost per epoch of a store of half the size."""
    epoch = human_seconds(estimate.num_tokens / max(cost.tokens_per_second, 1e-9))
    return (
        f"about {epoch} per epoch ({cost.tokens_per_second:,.0f} tokens per second, "
        f"{cost.share_of_capture:.0%} of the whole target's time), "
        f"{human_bytes(cost.weight_bytes)} of weights, loaded in {cost.load_seconds:.1f} s"
    )


def shard_table(
    shard_ids: Sequence[str], made: Mapping[str, ShardResult], store: Store
) -> list[dict[str, Any]]:
    """Return a row per committed shard: its size, and how it was computed if that is known."""
    rows = []
    for shard_id, record in store.some_commits(shard_ids[:MOST_IN_TABLE]).items():
        how = made.get(shard_id)
        rows.append(
            {
                "shard": shard_id[:12],
                "samples": len(record.sample_ids),
                "tokens": record.num_tokens,
                "size": human_bytes(record.stored_bytes),
                "of raw": f"{record.stored_bytes / record.raw_bytes:.1%}",
                "seconds": round(how.seconds, 1) if how else None,
                "attempt": how.attempt if how else None,
                "worker": how.worker if how else None,
            }
        )
    return rows


def store_rows(figures: StoreFigures) -> list[Row]:
    """Return what is in a store."""
    tokens = max(figures.num_tokens, 1)
    per_token = f"{figures.stored_bytes / tokens:,.0f} ({figures.raw_bytes / tokens:,.0f} raw)"
    ratio = f"{figures.stored_bytes / max(figures.raw_bytes, 1):.1%} of raw"
    rows = [
        *_identity_rows(figures.identity),
        ("shards", f"{figures.num_shards:,} ({figures.num_probed:,} with a semantic probe)"),
        ("samples", f"{figures.num_samples:,}"),
        ("tokens", f"{figures.num_tokens:,} ({figures.num_supervised:,} supervised)"),
        ("size", f"{human_bytes(figures.stored_bytes)} ({ratio})"),
        ("bytes per token", per_token),
    ]
    if figures.free_bytes is not None:
        rows.append(("free space", human_bytes(figures.free_bytes)))
    for snapshot in figures.snapshots[:MOST_LISTED]:
        name = "latest snapshot" if snapshot.is_latest else "snapshot"
        rows.append((name, _snapshot(snapshot)))
    if len(figures.snapshots) > MOST_LISTED:
        rows.append(("", f"and {len(figures.snapshots) - MOST_LISTED:,} more"))
    rows += [
        (
            "unfinished plan",
            f"{plan.plan_id}\n{plan.num_missing:,} of {plan.num_shards:,} shards are missing",
        )
        for plan in figures.unfinished[:MOST_LISTED]
    ]
    if figures.excluded:
        shown = "\n".join(map(str, figures.excluded[:MOST_LISTED]))
        more = len(figures.excluded) - MOST_LISTED
        rows.append(("excluded", f"{shown}\nand {more:,} more" if more > 0 else shown))
    if figures.damaged:
        shown = "\n".join(figures.damaged[:MOST_LISTED])
        rows.append(("unreadable", f"{shown}\nrun: eyas verify {figures.root}"))
    if figures.garbage is not None:
        rows.append(("garbage", _garbage(figures.garbage, figures.root)))
    return rows


def _identity_rows(identity: StoreIdentity) -> Iterator[Row]:
    fields = identity.target_fields
    how = [f"{name} {fields[name]}" for name in ("dtype", "attention", "backend") if name in fields]
    yield "target", ", ".join([identity.target_fingerprint[:12], *how])
    for name, digest in json.loads(fields.get("weights", "{}")).items():
        yield "", f"{name} {digest[:12]}"
    layers = ", ".join(str(layer) for layer in identity.aux_layers)
    norm = identity.norm_convention.replace("_", "-")
    yield "states", f"layers {layers} and the last ({norm}), {identity.hidden_size:,} wide"
    yield "vocabulary", f"{identity.vocab_size:,} tokens"
    yield "tokenizer", identity.tokenizer_fingerprint[:12]
    yield "chat template", identity.template_fingerprint[:12]
    yield "profile", identity.profile
    if identity.omitted is not None:
        yield "omitted states", f"the early and the last ones: {identity.omitted}"


def _snapshot(snapshot: SnapshotFigures) -> str:
    names = f"\n{', '.join(snapshot.names)}" if snapshot.names else ""
    return (
        f"{snapshot.snapshot_id}{names}\n{snapshot.num_samples:,} samples, "
        f"{snapshot.num_tokens:,} tokens in {snapshot.num_shards:,} shards"
    )


def _garbage(garbage: Garbage, root: str) -> str:
    if not garbage:
        return "nothing"
    return f"{_amount(garbage)}\nsee: eyas gc {root}"


def _amount(garbage: Garbage) -> str:
    parts = [
        f"{_count(len(garbage.shard_ids), 'shard')}, {human_bytes(garbage.num_bytes)}",
        f"{_count(len(garbage.snapshot_ids), 'snapshot')}, {_count(len(garbage.plan_ids), 'plan')}",
    ]
    if garbage.leftovers:
        parts.append(f"{_count(len(garbage.leftovers), 'object')} left behind by kills")
    return "; ".join(parts)


def verify_rows(summary: VerifySummary) -> list[Row]:
    """Return what was checked, and all damage."""
    damaged = {finding.shard_id for finding in summary.findings if finding.shard_id}
    state = f"{_count(len(summary.findings), 'finding')} in {_count(len(damaged), 'shard')}"
    return [
        ("store", summary.store_root),
        ("shards", f"{summary.num_shards:,}"),
        ("checked", summary.what),
        ("state", state if summary.findings else "sound"),
        *_finding_rows(summary.findings),
        ("time", human_seconds(summary.seconds)),
    ]


def repair_rows(summary: RepairSummary) -> list[Row]:
    """Return what was damaged and what was repaired."""
    rows = [("store", summary.store_root), ("shards", f"{summary.num_shards:,}")]
    if not summary.findings:
        rows.append(("state", "sound; there was nothing to repair"))
    else:
        state = (
            f"still damaged: {_count(len(summary.left), 'object')}" if summary.left else "repaired"
        )
        rows += [
            *_finding_rows(summary.findings, with_remedy=False),
            ("recomputed", _listed(summary.remade) or "no shard"),
            ("state", state),
        ]
    return [*rows, ("time", human_seconds(summary.seconds))]


def garbage_rows(garbage: Garbage, kept: Mapping[str, str], *, deleted: bool) -> list[Row]:
    """Return the unneeded objects, and which snapshots are kept and why."""
    reasons = [f"{snapshot_id} ({why})" for snapshot_id, why in kept.items()]
    rows = [("snapshots kept", _listed(reasons) or "none")]
    if any("held by run" in why for why in kept.values()):
        rows.append(("", "--release RUN releases the snapshots of a run whose folder is gone"))
    if not kept:
        return [*rows, ("garbage", "nothing: no snapshot records what is needed")]
    if garbage:
        rows.append(("deleted" if deleted else "to delete", _amount(garbage)))
    else:
        rows.append(("garbage", "nothing"))
    for name, ids in (
        ("snapshots", garbage.snapshot_ids),
        ("plans", garbage.plan_ids),
        ("shards", garbage.shard_ids),
        ("left behind", garbage.leftovers),
    ):
        if ids:
            rows.append((f"  {name}", _listed(ids)))
    if garbage.young_bytes:
        amount = human_bytes(garbage.young_bytes)
        remedy = "if no run is active, --older-than 0 (in a flow: older_than_hours) includes it"
        rows.append(("too young", f"{amount}, unneeded; {remedy}"))
    return rows


def _finding_rows(findings: Sequence[Finding], *, with_remedy: bool = True) -> Iterator[Row]:
    for number, finding in enumerate(findings[:MOST_LISTED], start=1):
        lines = [finding.object_key, finding.problem]
        yield f"damage {number}", "\n".join([*lines, finding.remedy] if with_remedy else lines)
    if len(findings) > MOST_LISTED:
        yield "", f"and {len(findings) - MOST_LISTED:,} more"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _listed(ids: Sequence[str]) -> str:
    more = [f"and {len(ids) - MOST_LISTED:,} more"] if len(ids) > MOST_LISTED else []
    return "\n".join([*ids[:MOST_LISTED], *more])
