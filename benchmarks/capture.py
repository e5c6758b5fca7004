"""Capturing states: whole, layer by layer and by vLLM, and a target that is larger than its memory.

`python -m benchmarks.capture smollm2 --results docs/benchmarks/capture.md` takes conversations that
`make demo` (or a hidden-states flow) left in the home folder. Each capture runs in a process of its
own; those of one type take turns within each round. With `--vllm-python PYTHON`, vLLM takes its
turn. With `--large FOLDER`, a random target of about 16 GB is written there, captured layer by
layer, and deleted.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.capture_worker import Done, Job
from benchmarks.machine import describe
from benchmarks.random_target import HIDDEN_SIZE, write_random_target
from deployments.recipe import load_recipe
from eagle_core.target import weights
from eagle_core.target.capture import LOGITS_CHUNK_TOKENS
from eagle_core.target.config import TargetConfig
from eagle_core.target.memory.free_memory import Memory
from eagle_core.target.memory.target_bytes import TargetBytes
from eagle_core.target.model_config import read_model_config
from eagle_core.target.placement import choose_placement
from flows.workspace import DEFAULT_HOME, Workspace

PASSES = (16, 4, 1)
PACKAGES = ("torch", "transformers", "safetensors")
REPORT = """\
# Capturing states

`{command}`: {machine}; {threads} threads; median of {rounds}.

{name}, {tokens:,} tokens of real conversations in batches of {batch_tokens:,}; teacher included.
Memory is the peak of anonymous memory, of vLLM's process too, above that of the process before
the target is loaded: without mapped weight files. vLLM's includes its cache.

{rates}
{large}
## On paper

A pass reads all layers once, and takes the longer of reading and running. Tokens of a pass are
those that `target.placement: auto` chooses with {main:.0f} GB of free main memory and batches of
8,192 tokens. Reading: layers x their size / 3 GB/s, from an NVMe disk. Running: tokens x layers x
2 x active weights / (0.4 x peak), with peaks in dense bfloat16 of 165 (RTX 4090, 24 GB), 362 (L40S,
48 GB) and 312 TFLOP/s (A100, 80 GB). Nobody ran these.

{paper}
"""


@dataclass(frozen=True, kw_only=True)
class Big:
    """A target on paper."""

    num_layers: int
    layer_weights: float
    active_weights: float
    """Of a layer, per token."""
    hidden_size: int
    vocab_size: int


BIG = {
    "Llama-3.3-70B": Big(
        num_layers=80,
        layer_weights=0.856e9,
        active_weights=0.856e9,
        hidden_size=8192,
        vocab_size=128_256,
    ),
    "Qwen3-235B-A22B": Big(
        num_layers=94,
        layer_weights=2.49e9,
        active_weights=0.221e9,
        hidden_size=4096,
        vocab_size=151_936,
    ),
}
CARDS = {"24 GB": (24e9, 165e12), "48 GB": (48e9, 362e12), "80 GB": (80e9, 312e12)}
"""Memory and operations per second."""
_PADDING = 1.15
"""So that batches, which are padded and not divided, need no further pass."""
_MAIN, _READ, _USE, _BFLOAT16, _FLOAT32 = 256e9, 3e9, 0.4, 2, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to capture."""

    title: str
    target: TargetConfig


def main() -> None:
    """Print the tables, and write them to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path(DEFAULT_HOME))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--passes", type=int, nargs="+", default=PASSES, help="of a capture")
    parser.add_argument("--batch-tokens", type=int, help="of transformers; the recipe's if empty")
    parser.add_argument("--vllm-python", default="", help="a Python with vLLM")
    parser.add_argument("--large", type=Path, help="folder for a target of 16 GB, deleted after")
    parser.add_argument("--large-layers", type=int, default=36)
    parser.add_argument("--large-tokens", type=int, default=2048)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    batch = f"target.batch_tokens={arguments.batch_tokens}" if arguments.batch_tokens else ""
    recipe = load_recipe(arguments.recipe, [batch] if batch else [])
    space = Workspace(home=arguments.home, target=recipe.target.name, dataset=recipe.dataset.name)
    tokens = max(space.tokens_path.glob("train-*.arrow"), key=lambda path: path.stat().st_mtime)
    console = Console(width=160)
    rows = []
    for dtype in arguments.dtypes:
        cases = list(
            _cases(
                *(recipe.target, dtype, arguments.tokens, arguments.passes, arguments.vllm_python)
            )
        )
        done = _in_turns(cases, tokens, arguments.tokens, arguments.rounds)
        rows += list(_rates(cases, done))
        console.print("\n".join(rows), markup=False)
    large = _large(recipe.target, tokens, arguments) if arguments.large else ""
    report = REPORT.format(
        command=" ".join(["python -m benchmarks.capture", *map(_shown, sys.argv[1:])]),
        machine=describe(PACKAGES),
        threads=_threads(),
        rounds=arguments.rounds,
        name=recipe.target.name,
        tokens=done[0].num_tokens,
        batch_tokens=recipe.target.batch_tokens,
        rates="\n".join([*_RATES_HEAD, *rows]),
        large=large,
        main=_MAIN / 1e9,
        paper="\n".join(_paper()),
    )
    console.print(report, markup=False)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


def _shown(argument: str) -> str:
    """Return an argument without folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument


def _threads() -> int:
    import torch  # noqa: PLC0415 (only for this figure)

    return torch.get_num_threads()


def _cases(
    target: TargetConfig, dtype: str, num_tokens: int, passes: Sequence[int], vllm_python: str
) -> Iterator[Case]:
    plain = target.model_copy(update={"dtype": dtype, "device": "cpu", "placement": "whole"})
    yield Case(title=f"whole | {dtype} |", target=plain)
    if vllm_python:
        engine = {"backend": "vllm", "vllm_python": vllm_python, "placement": "auto"}
        yield Case(title=f"vLLM | {dtype} |", target=plain.model_copy(update=engine))
    for number in passes:
        most = int(_PADDING * num_tokens / number)
        streamed = plain.model_copy(update={"placement": "streamed", "stream_tokens": most})
        yield Case(title=f"streamed | {dtype} | {num_tokens // number:,}", target=streamed)


def _in_turns(cases: Sequence[Case], tokens: Path, num_tokens: int, rounds: int) -> list[Done]:
    """Run each case once per round; return its times together, and its largest memory."""
    turns = [[_run(case.target, tokens, num_tokens) for case in cases] for _ in range(rounds)]
    return [
        Done(
            num_tokens=runs[0].num_tokens,
            seconds=[run.seconds[0] for run in runs],
            peak_bytes=max(run.peak_bytes for run in runs),
            placement=runs[0].placement,
        )
        for runs in zip(*turns, strict=True)
    ]


def _run(target: TargetConfig, tokens: Path, num_tokens: int) -> Done:
    job = Job(target=target, token_file=tokens, num_tokens=num_tokens, rounds=1)
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.capture_worker"],
        input=job.model_dump_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Done.model_validate_json(found.stdout.splitlines()[-1])


_RATES_HEAD = (
    "| placement | dtype | tokens per pass | tokens/s | of whole | memory |",
    "|---|---|---|---|---|---|",
)


def _rates(cases: Sequence[Case], found: Sequence[Done]) -> Iterator[str]:
    whole = found[0].seconds
    for case, done in zip(cases, found, strict=True):
        ratio = statistics.median(a / b for a, b in zip(whole, done.seconds, strict=True))
        rate = done.num_tokens / statistics.median(done.seconds)
        yield f"| {case.title} | {rate:,.0f} | {ratio:.2f} | {done.peak_bytes / 1e9:.2f} GB |"


def _large(target: TargetConfig, tokens: Path, arguments: argparse.Namespace) -> str:
    folder = arguments.large / "random-target"
    like = weights.locate(target)
    vocab_size = read_model_config(target, like).vocab_size
    try:
        num_bytes = write_random_target(
            folder, num_layers=arguments.large_layers, like=like, vocab_size=vocab_size
        )
        settings = {
            "model": str(folder),
            "dtype": "bfloat16",
            "device": "cpu",
            "placement": "streamed",
            "batch_tokens": 1024,
            "aux_layers": None,
        }
        done = _run(target.model_copy(update=settings), tokens, arguments.large_tokens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rate = done.num_tokens / done.seconds[0]
    return (
        f"\nA random target of {num_bytes / 1e9:.1f} GB ({arguments.large_layers} layers, "
        f"{HIDDEN_SIZE:,} wide, bfloat16): {done.num_tokens:,} tokens layer by layer in "
        f"{done.peak_bytes / 1e9:.2f} GB of anonymous memory, {rate:.1f} tokens/s.\n"
    )


def _paper() -> Iterator[str]:
    yield "| target | card | layer | tokens per pass | reading | running | tokens/s | of whole |"
    yield "|" + "---|" * 8
    for name, big in BIG.items():
        layer = _BFLOAT16 * big.layer_weights
        sizes = TargetBytes(
            ends=2 * _BFLOAT16 * big.vocab_size * big.hidden_size,
            layers=(int(layer),) * big.num_layers,
            layers_on_disk=int(layer) * big.num_layers,
            state=_BFLOAT16 * big.hidden_size,
            logits=3 * _FLOAT32 * LOGITS_CHUNK_TOKENS * big.vocab_size,
        )
        for card, (memory, peak) in CARDS.items():
            config = TargetConfig(name="on-paper", model="on/paper", placement="streamed")
            free = Memory(main=int(_MAIN), gpus=(int(memory),))
            tokens = choose_placement(config, sizes, free).group_tokens
            reading = big.num_layers * layer / _READ
            running = tokens * big.num_layers * 2 * big.active_weights / (_USE * peak)
            yield (
                f"| {name} | {card} | {layer / 1e9:.1f} GB | {tokens:,} | {reading:.0f} s | "
                f"{running:.0f} s | {tokens / max(reading, running):,.0f} | "
                f"{running / max(reading, running):.2f} |"
            )


if __name__ == "__main__":
    main()
