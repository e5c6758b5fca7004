"""The hidden-states flow with a dry-run target: random states from this process, no model.

Started by `benchmarks.orchestration` in a separate process. With `--bare` the same shards are
planned and written without Prefect, as the baseline of the flow.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

import flows.workers.pool
from deployments.recipe import load_recipe
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.stored_source import to_stored
from flows.hidden_states import hidden_states
from flows.workers.shard_batch import ShardBatch, ShardReport
from storage.records.identity import StoreIdentity
from storage.records.plan import PlannedSample
from storage.store import Store


class DryChild:
    """Replaces the child process that generates shards."""

    def __init__(self, module: str, *, environment: Mapping[str, str]) -> None:
        """Start nothing."""
        del module, environment
        self.is_idle = True

    def request(
        self, request: BaseModel, *, what: str, inactivity_timeout_seconds: float
    ) -> Iterator[str]:
        """Generate the shards of a batch from random states."""
        del what, inactivity_timeout_seconds
        return dry_run(ShardBatch.model_validate(request))

    def close(self) -> None:
        """Do nothing: there is no process to end."""


def dry_run(batch: ShardBatch) -> Iterator[str]:
    """Generate the shards of a batch from random states; yield the output lines of a child."""
    store = Store.open(batch.store_root)
    shards = {shard.shard_id: shard for shard in store.plans.load(batch.plan_id).shards}
    files = [TokenFile(path) for path in batch.token_files]
    for shard_id in batch.shard_ids:
        names = shards[shard_id].sample_ids
        samples = [one for file in files for one in file.by_id([n for n in names if n in file])]
        for sample in samples:
            yield ShardReport(kind="tokens", tokens=len(sample)).model_dump_json()
        states = [_random_states(sample, store.identity) for sample in samples]
        store.write_shard(shards[shard_id], map(to_stored, states), probe=())
        yield ShardReport(kind="shard", shard_id=shard_id).model_dump_json()


def _random_states(sample: TokenizedSample, identity: StoreIdentity) -> HiddenStateSample:
    rng = np.random.default_rng(int(sample.sample_id[:8], 16))
    length, hidden_size = len(sample), identity.hidden_size

    def bits(*shape: int) -> np.ndarray:
        return rng.integers(0x3F00, 0x4000, shape, dtype=np.uint16)  # from 0.5 to 2

    return HiddenStateSample(
        sample_id=sample.sample_id,
        input_ids=sample.input_ids,
        loss_mask=sample.loss_mask,
        aux_hidden_states=bits(length, 3, hidden_size),
        last_hidden_state=bits(length, hidden_size),
        target_argmax=rng.integers(0, identity.vocab_size, length, dtype=np.int32),
        target_logsumexp=rng.random(length, dtype=np.float32),
    )


def make_bare(original: Store, root: str, token_files: Sequence[Path], *, each: int) -> None:
    """Regenerate every shard of `original` in a new store at `root`, in batches of `each`."""
    store = Store.create(root, original.identity)
    wanted = [
        PlannedSample(sample_id=name, num_tokens=length)
        for file in map(TokenFile, token_files)
        for name, length in zip(file.sample_ids, file.lengths.tolist(), strict=True)
    ]
    plan = store.plan(wanted, shard_tokens=1)
    names = [shard.shard_id for shard in plan.shards]
    target = load_recipe("smollm2").target  # not used
    for first in range(0, len(names), each):
        batch = ShardBatch(
            target=target,
            store_root=root,
            plan_id=plan.plan_id,
            shard_ids=tuple(names[first : first + each]),
            token_files=tuple(token_files),
        )
        for _ in dry_run(batch):
            pass
    commits = store.commits()
    store.publish([sample.sample_id for sample in wanted], commits=commits)


def main() -> None:
    """Generate the shards, and print the wall and processor seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--home", required=True)
    parser.add_argument("--bare", help="Root of a new store to fill without Prefect.")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    begun, begun_cpu = time.monotonic(), time.process_time()
    if arguments.bare:
        files = sorted((Path(arguments.home) / "tokens").glob("*/*-*.arrow"), reverse=True)
        original = Store.open(str(recipe.store.root))
        make_bare(original, arguments.bare, files, each=recipe.store.shards_per_task)
    else:
        flows.workers.pool.Child = DryChild  # type: ignore[assignment,attr-defined]  # replaced
        hidden_states(recipe.target, recipe.dataset, recipe.store, home=arguments.home)
    print(json.dumps([time.monotonic() - begun, time.process_time() - begun_cpu]))


if __name__ == "__main__":
    main()
