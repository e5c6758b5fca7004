"""How well stored states reproduce the target's recorded log-probabilities.

`python -m benchmarks.probe RECIPE TOKENS` runs the target of a recipe over samples of a token file
and compares the log-probability of its argmax, taken from the real output, with the one recomputed
from states as each profile returns them, also with logits rounded like those of a bfloat16 target,
and from wrong states.

Values are differences in nats. For wrong states "least of 8" is the smallest, over many draws of 8
points (as many as a shard's probe has), of the largest difference: a tolerance must stay below it.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.recipe import load_recipe
from eagle_core.bfloat16 import from_bfloat16_bits, to_bfloat16_bits
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import batches_by_length, capture_states
from eagle_core.target.head import log_probabilities
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import for_decoding
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.stored_source import to_stored
from storage.probe import NUM_POINTS
from storage.profiles import PROFILES, ProfileName
from storage.records.identity import StoreIdentity
from storage.records.plan import PlannedSample
from storage.samples import StoredSample
from storage.store import Store

DRAWS = 2000
Bits = NDArray[np.uint16]


def capture(
    target: TargetModel, samples: Sequence[TokenizedSample]
) -> Iterator[tuple[HiddenStateSample, Bits]]:
    """Yield every sample's states, and its states before the final norm."""
    before_norm: list[torch.Tensor] = []
    norm = target._decoder.get_submodule("norm")  # noqa: SLF001 (a benchmark may look inside)
    norm.register_forward_pre_hook(lambda _module, inputs: before_norm.append(inputs[0]))
    for batch in batches_by_length(samples, batch_tokens=target.config.batch_tokens):
        for row, state in enumerate(capture_states(target, batch)):
            yield state, to_bfloat16_bits(before_norm[-1][row, : len(state)])


def through_store(
    profile: ProfileName, states: Sequence[HiddenStateSample]
) -> Mapping[str, StoredSample]:
    """Return the samples as read back from a store of this profile."""
    identity = StoreIdentity(
        target_fingerprint="benchmark",
        target_fields={},
        tokenizer_fingerprint="benchmark",
        template_fingerprint="benchmark",
        aux_layers=(0, 1, 2),
        hidden_size=states[0].last_hidden_state.shape[-1],
        vocab_size=1 << 20,
        norm_convention="post_norm",
        profile=profile,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(folder, identity)
        planned = [PlannedSample(sample_id=s.sample_id, num_tokens=len(s)) for s in states]
        (shard,) = store.plan(planned, shard_tokens=10**9).shards
        store.write_shard(shard, [to_stored(state) for state in states])
        reader = store.reader(store.publish(shard.sample_ids))
        samples = [reader.fetch(index) for index in range(len(reader))]
    return {sample.sample_id: sample for sample in samples}


def rounded_logits(head: torch.Tensor, last: Bits, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return log-probabilities from logits that were rounded to bfloat16."""
    found = []
    for first in range(0, len(last), 256):
        rows = slice(first, first + 256)
        logits = from_bfloat16_bits(last[rows], dtype=torch.float32) @ head.T
        logits = logits.bfloat16().float()
        wanted = logits.gather(-1, torch.from_numpy(ids[rows].astype(np.int64))[:, None])[:, 0]
        found.append((wanted - logits.logsumexp(dim=-1)).numpy())
    return np.concatenate(found)


def least_of_draws(difference: NDArray[np.float32]) -> float:
    """Return the smallest, over many draws of 8 points, of the largest difference in a draw."""
    rng = np.random.default_rng(0)
    return float(min(rng.choice(difference, NUM_POINTS).max() for _ in range(DRAWS)))


@torch.inference_mode()
def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("tokens", help="a token file of the recipe's data set")
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    target = TargetModel.load(for_decoding(load_recipe(arguments.recipe).target))
    file = TokenFile(arguments.tokens)
    rows = np.linspace(0, len(file) - 1, arguments.samples).astype(int)
    captured = list(capture(target, [file.fetch(int(row)) for row in rows]))
    states = [state for state, _ in captured]
    head = target.lm_head_weight.detach().float()

    def supervised(part: Callable[[HiddenStateSample], Any]) -> Any:  # noqa: ANN401 (any array)
        return np.concatenate([part(state)[state.loss_mask] for state in states])

    ids = supervised(lambda state: state.target_argmax)
    recorded = supervised(lambda state: state.argmax_logprob)
    print(f"{len(recorded)} supervised tokens of {len(states)} samples")
    print(f"{'correct states':<26} {'largest':>8} {'99.9 %':>8} {'median':>8}")
    for profile in PROFILES:
        stored = through_store(profile, states)
        last = supervised(lambda state: stored[state.sample_id].last_hidden_state)  # noqa: B023
        for logits, recompute in (("float32", log_probabilities), ("bfloat16", rounded_logits)):
            difference = np.abs(recompute(head, last, ids) - recorded)
            values = (difference.max(), np.quantile(difference, 0.999), np.median(difference))
            print(f"{f'{profile}, {logits} logits':<26} " + " ".join(f"{v:8.4f}" for v in values))
    before_norm = {state.sample_id: bits for state, bits in captured}
    wrong: Mapping[str, Callable[[HiddenStateSample], Any]] = {
        "before the norm": lambda state: before_norm[state.sample_id],
        "the late aux layer": lambda state: state.aux_hidden_states[:, -1],
        "the next token's": lambda state: np.roll(state.last_hidden_state, -1, axis=0),
    }
    print(f"\n{'wrong states':<26} {'least of 8':>10} {'median':>8}")
    for name, part in wrong.items():
        difference = np.abs(log_probabilities(head, supervised(part), ids) - recorded)
        print(f"{name:<26} {least_of_draws(difference):10.2f} {np.median(difference):8.2f}")


if __name__ == "__main__":
    main()
