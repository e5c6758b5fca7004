"""Recomputed against stored states: bytes, exactness, error and time, on real conversations.

`python -m benchmarks.recompute smollm2 --results docs/benchmarks/recompute.md`

takes conversations that `make demo` (or a hidden-states flow) left in the home folder, captures
them one sequence at a time in float32 and prints three tables:

* size: bytes per token of complete stores, with all or half of the states, by profile; and the same
  ratios applied to Llama-3-8B. Teacher KL (nats) is of the `last` that training reads, from that of
  the same forward, over random supervised positions and the full vocabulary.
* exactness: of recomputed states, one sequence at a time and in padded batches.
* time: of recomputing against the decoder of the full target, which online training computes in
  every epoch. Neither includes the head.

Times are medians of the rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.states import identity, load_target, token_file
from benchmarks.store import teacher_kl
from deployments.recipe import load_recipe
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import batches_by_length, capture_states
from eagle_core.target.layerwise.recompute_model import (
    RecomputedStates,
    RecomputeModel,
    StoredStates,
)
from eagle_core.target.model import TargetModel
from flows.bridge.recompute import completed
from flows.bridge.store_identity import omitted_states
from flows.bridge.stored_source import to_stored
from flows.workspace import DEFAULT_HOME
from storage.profiles import ProfileName
from storage.records.plan import PlannedShard
from storage.samples import StoredSample, last_needed
from storage.store import Store

PACKAGES = ("zarr", "zstandard", "numpy", "torch", "transformers", "safetensors")
PROFILES: Sequence[ProfileName] = ("raw", "lossless", "int8")
LLAMA_HIDDEN, LLAMA_VOCAB = 4096, 128_256
LLAMA_LAYER_PARAMETERS = 218_112_000
"""4096 * (4096 + 1024 + 1024 + 4096) of attention, 3 * 4096 * 14336 of the MLP, and two norms."""
REPORT = """\
# Recomputed against stored states

`{command}`: {machine}; OMP threads: {threads}; median of {rounds}.

{num_samples} conversations, {tokens:,} tokens, hidden size {hidden}, {num_layers} layers; layers
{early} and {last} are recomputed.

{sizes}

Llama-3-8B (hidden size 4,096, 32 layers) at the same compression ratios. All states are
4 x 4,096 x 2 = 32,768 bytes per token if every token keeps its last state (here {kept:.0%} do), the
middle and late states are 2 x 4,096 x 2 = 16,384.
{ratios}

{exactness}

Feeding the last layers the late state in bfloat16, as generation for such a store does, moves
`last` by a teacher KL of {rounding:.1e} nats from the plain float32 forward.

{times}

For Llama-3-8B 2 + 3 of 32 layers are 5/32 = 15.6 % of the decoder. Their weights are
5 x {layer_parameters:,} x 2 bytes = {llama_layers:.2f} GB, and the embedding 128,256 x 4,096 x 2 =
{llama_embedding:.2f} GB.
"""


def _write(
    states: Sequence[StoredSample],
    folder: Path,
    profile: ProfileName,
    *,
    recompute: bool,
    target: TargetModel,
) -> tuple[float, list[StoredSample]]:
    """Write one store; return its bytes per token, and the samples read back from it."""
    about = identity(states[0], vocab_size=len(target.lm_head_weight), profile=profile)
    about = replace(about, aux_layers=target.aux_layers)
    if recompute:
        about = replace(about, omitted=omitted_states(target.config, target.model_config))
    store = Store.create(str(folder / f"{profile}-{recompute}"), about)
    shard = PlannedShard.holding(states)
    record = store.write_shard(shard, states)
    reader = store.reader(store.publish([s.sample_id for s in states]))
    found = {s.sample_id: s for s in map(reader.fetch, range(len(reader)))}
    return record.stored_bytes / record.num_tokens, [found[s.sample_id] for s in states]


def _supervised(
    samples: Sequence[StoredSample], arrays: Sequence[NDArray[np.uint16]]
) -> NDArray[np.uint16]:
    """Return the rows [R, H] of last states that training reads."""
    kept = [last_needed(sample.loss_mask) for sample in samples]
    return np.concatenate([array[rows] for array, rows in zip(arrays, kept, strict=True)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Size and error of one kind of store."""

    bytes_per_token: float
    teacher_kl: float


def measure_sizes(
    captured: Sequence[HiddenStateSample], target: TargetModel, recompute_model: RecomputeModel
) -> Mapping[str, Size]:
    """Write a store of each kind and read it as training does."""
    states = [to_stored(state) for state in captured]
    head = target.lm_head_weight.float().numpy()
    true = _supervised(states, [state.last_hidden_state for state in states])
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for recompute in (False, True):
            for profile in PROFILES:
                cost, found = _write(
                    states, Path(folder), profile, recompute=recompute, target=target
                )
                if recompute:
                    found = [completed(sample, recompute_model) for sample in found]
                last = _supervised(states, [sample.last_hidden_state for sample in found])
                sizes[profile + " + recompute" * recompute] = Size(
                    bytes_per_token=cost, teacher_kl=teacher_kl(true, last, head)
                )
    return sizes


def size_table(sizes: Mapping[str, Size]) -> Iterator[str]:
    """Yield the rows in Markdown."""
    yield "| store | bytes/token | of raw | teacher KL, nats |"
    yield "|---|---|---|---|"
    for name, size in sizes.items():
        share = size.bytes_per_token / sizes["raw"].bytes_per_token
        yield f"| {name} | {size.bytes_per_token:,.0f} | {share:.3f} | {size.teacher_kl:.1e} |"


def llama_table(sizes: Mapping[str, Size]) -> Iterator[str]:
    """Yield Llama-3-8B's bytes at the measured compression ratios, in Markdown."""
    yield "| store of Llama-3-8B | arithmetic | bytes/token | 375 M tokens |"
    yield "|---|---|---|---|"
    for half in (False, True):
        bare, suffix = (4 - 2 * half) * LLAMA_HIDDEN * 2, " + recompute" * half
        for profile in PROFILES:
            ratio = sizes[profile + suffix].bytes_per_token / sizes["raw" + suffix].bytes_per_token
            size = bare * ratio
            yield (
                f"| {profile}{suffix} | {bare:,} x {ratio:.3f} | {size:,.0f} | "
                f"{size * 375e6 / 1e12:.1f} TB |"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Exactness:
    """Recomputed against captured states."""

    samples: float
    """Share of bit-identical samples."""
    early: float
    """Share of bit-identical values."""
    last: float
    teacher_kl: float


def measure_exactness(
    recomputed: Sequence[RecomputedStates],
    captured: Sequence[HiddenStateSample],
    head: NDArray[np.float32],
) -> Exactness:
    """Compare recomputed states with those of generation."""
    early = [
        found.early == state.aux_hidden_states[:, 0]
        for found, state in zip(recomputed, captured, strict=True)
    ]
    last = [
        found.last == state.last_hidden_state
        for found, state in zip(recomputed, captured, strict=True)
    ]
    states = [to_stored(state) for state in captured]
    true = _supervised(states, [state.last_hidden_state for state in states])
    found = _supervised(states, [sample.last for sample in recomputed])
    whole = [a.all() and b.all() for a, b in zip(early, last, strict=True)]
    return Exactness(
        samples=float(np.mean(whole)),
        early=float(np.mean(np.concatenate(early))),
        last=float(np.mean(np.concatenate(last))),
        teacher_kl=teacher_kl(true, found, head),
    )


def exactness_table(found: Mapping[str, Exactness]) -> Iterator[str]:
    """Yield the rows in Markdown."""
    yield "| mode | samples equal | early values equal | last values equal | teacher KL, nats |"
    yield "|---|---|---|---|---|"
    for name, exact in found.items():
        yield (
            f"| {name} | {exact.samples:.0%} | {exact.early:.2%} | {exact.last:.2%} | "
            f"{exact.teacher_kl:.1e} |"
        )


def derive_in_batches(
    recompute_model: RecomputeModel,
    captured: Sequence[HiddenStateSample],
    batches: Sequence[Sequence[TokenizedSample]],
) -> list[RecomputedStates]:
    """Return the recomputed states of sequences run together, in the order of `captured`."""
    kept = {state.sample_id: _kept(state) for state in captured}
    found: dict[str, RecomputedStates] = {}
    for batch in batches:
        ids = [sample.sample_id for sample in batch]
        found.update(zip(ids, recompute_model.derive_together([kept[i] for i in ids]), strict=True))
    return [found[state.sample_id] for state in captured]


def _kept(state: HiddenStateSample) -> StoredStates:
    return StoredStates(input_ids=state.input_ids, late=state.aux_hidden_states[:, -1])


def _median_seconds(work: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each function; they take turns within each round."""
    seconds: list[list[float]] = [[] for _ in work]
    for _ in range(rounds):
        for times, do in zip(seconds, work, strict=True):
            begun = time.perf_counter()
            do()
            times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in seconds]


def time_table(
    target: TargetModel,
    recompute_model: RecomputeModel,
    captured: Sequence[HiddenStateSample],
    batches: Sequence[Sequence[TokenizedSample]],
    rounds: int,
) -> Iterator[str]:
    """Measure and yield the rows in Markdown."""
    ids = [torch.from_numpy(state.input_ids.astype(np.int64))[None] for state in captured]
    whole, alone, together = _median_seconds(
        [
            lambda: [target.forward_cached(sequence, None) for sequence in ids],
            lambda: [recompute_model.recompute(_kept(state)) for state in captured],
            lambda: derive_in_batches(recompute_model, captured, batches),
        ],
        rounds,
    )
    tokens = sum(len(state) for state in captured)
    weights = target.num_bytes / 1e6
    yield "| computed in every epoch | tokens/s | of the whole target | weights, MB | loaded in |"
    yield "|---|---|---|---|---|"
    yield f"| whole target, as online | {tokens / whole:,.0f} | 100 % | {weights:,.0f} | |"
    yield (
        f"| recompute, one sequence at a time | {tokens / alone:,.0f} | {alone / whole:.1%} | "
        f"{recompute_model.num_bytes / 1e6:,.0f} | {recompute_model.load_seconds:.1f} s |"
    )
    yield (
        f"| recompute, padded batches | {tokens / together:,.0f} | {together / whole:.1%} | "
        f"{recompute_model.num_bytes / 1e6:,.0f} | |"
    )


def report(arguments: argparse.Namespace) -> str:
    """Measure everything and return the report in Markdown."""
    target = load_target(arguments.recipe)
    config = target.config
    samples = list(token_file(arguments.recipe, arguments.home))[: arguments.samples]
    captured = list(capture_states(target, samples, for_recompute=True))
    plain = {state.sample_id: state for state in capture_states(target, samples)}
    recompute_model = RecomputeModel.load(config)
    head = target.lm_head_weight.float().numpy()
    batch_tokens = load_recipe(arguments.recipe).target.batch_tokens
    batches = list(batches_by_length(samples, batch_tokens=batch_tokens))
    sizes = measure_sizes(captured, target, recompute_model)
    exactness = {
        "one sequence at a time": measure_exactness(
            [recompute_model.recompute(_kept(state)) for state in captured], captured, head
        ),
        f"padded batches of {batch_tokens:,} tokens": measure_exactness(
            derive_in_batches(recompute_model, captured, batches), captured, head
        ),
    }
    states = [to_stored(state) for state in captured]
    rounding = teacher_kl(
        _supervised(states, [plain[s.sample_id].last_hidden_state for s in states]),
        _supervised(states, [s.last_hidden_state for s in states]),
        head,
    )
    return REPORT.format(
        command=f"python -m benchmarks.recompute {arguments.recipe} --samples {arguments.samples}",
        machine=describe(PACKAGES),
        threads=torch.get_num_threads(),
        rounds=arguments.rounds,
        num_samples=len(samples),
        tokens=sum(len(sample) for sample in samples),
        hidden=target.model_config.hidden_size,
        num_layers=target.model_config.num_hidden_layers,
        early=list(recompute_model.early_layers),
        last=list(recompute_model.last_layers),
        kept=np.mean(np.concatenate([last_needed(sample.loss_mask) for sample in samples])),
        sizes="\n".join(size_table(sizes)),
        ratios="\n" + "\n".join(llama_table(sizes)),
        exactness="\n".join(exactness_table(exactness)),
        rounding=rounding,
        times="\n".join(time_table(target, recompute_model, captured, batches, arguments.rounds)),
        layer_parameters=LLAMA_LAYER_PARAMETERS,
        llama_layers=5 * LLAMA_LAYER_PARAMETERS * 2 / 1e9,
        llama_embedding=LLAMA_VOCAB * LLAMA_HIDDEN * 2 / 1e9,
    )


def main() -> None:
    """Print the report and write it to `--results`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--home", type=Path, default=Path(DEFAULT_HOME))
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found = report(arguments)
    Console().print(found, markup=False, soft_wrap=True, highlight=False)
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
