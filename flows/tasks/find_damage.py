"""Finds damage in a store, with the target: every byte, and the semantic probe."""

import dataclasses
from collections.abc import Sequence

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.fingerprint import fingerprint, fingerprint_fields
from eagle_core.target.model_config import resolve_device
from flows.bridge.recompute import TargetRecompute, load_recompute_model
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.progress import stage_progress
from storage.maintenance.verify import verify_store
from storage.recompute import Recompute
from storage.records.presence import Finding
from storage.store import Store


def probe_recompute(target: TargetConfig, store: Store) -> Recompute:
    """Return `target`'s recompute for a store; MismatchError if the store is of another target."""
    folder = weights.locate(target)
    fields = fingerprint_fields(target, folder)
    expected = dataclasses.replace(
        store.identity, target_fields=fields, target_fingerprint=fingerprint(fields)
    )
    store.identity.require_equal(expected, where=f"the store at {store.root.url}")
    _, lm_head = load_ends(folder, dtype=torch.float32)
    device = resolve_device(target.device)
    return TargetRecompute(lm_head.to(device), load_recompute_model(target, store.identity))


@task(task_run_name="find damage", cache_policy=NO_CACHE, persist_result=False)
def find_damage(
    store: Store, *, deep: bool, recompute: Recompute | None, title: str
) -> Sequence[Finding]:
    """Return all differences between the store and its commit records."""
    total = len(store.shard_ids())
    key = artifact_key("verify-progress", title)
    with stage_progress("verifying", key=key, total=total, unit="shards") as progress:
        return verify_store(
            store,
            deep=deep,
            recompute=recompute,
            on_shard=lambda shard_id: progress.advance(note=shard_id[:8]),
        )
