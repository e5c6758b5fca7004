"""Our training step against two peers, taking turns within one run.

Run: python -m benchmarks.train_step --speculators-venv FOLDER --results FILE

One step is forward, backward, gradient clipping and AdamW on one pack of real ShareGPT masks (ids
and states are random). Peers, each in a separate process, one working at a time:

* `eyas`: `eagle_core.training.ttt` as the trainer calls it.
* `plain`: the published step in eager PyTorch (`benchmarks/plain_step.py`).
* `speculators`: the model of the speculators package (`benchmarks/speculators_step.py`), which
  freezes the draft's head; `speculators+head` trains it as the others do. Skipped without an
  environment that has the package.

All start from the same weights and tensors, and the same positions count in their losses: the table
shows how far their first gradients are from ours. Values are medians of the rounds. "Step memory"
is the peak of resident memory above the loaded memory (weights, optimizer state, batch). The row of
a peer that is late, or does not fit into memory, has the reason. The second table compares our step
with the time that its needed matrix products would take (`benchmarks/step_arithmetic.py`).

With `--device cuda` the steps run on a GPU: memory is what torch allocates there, the columns of
processor time mean little, and `--peak-tflops` (advertised for the dtype) gives the model-FLOPs
utilisation. `--compile` lets steps use torch.compile, ours with FlexAttention.

Rounds adapt to `--minutes`: each case runs at least one.
"""

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.published_cases import PUBLISHED, published_table
from benchmarks.sharegpt_masks import PackedMask, sharegpt_samples, typical_pack
from benchmarks.step_arithmetic import ProductRate, product_rate
from benchmarks.step_case import SHAPES, StepCase
from benchmarks.step_report import OURS, CaseResult, PeerResult, bound_table, step_rows, step_table
from benchmarks.step_worker import PeerFailedError, Ready, Turn, Worker

PEERS = ("eyas", "plain", "speculators", "speculators+head")
PACKAGES = ("torch", "transformers")
NUM_CONVERSATIONS = 300
REPORT = """\
# The training step against two peers

`{command}`: {machine}. speculators is 0.9.0 with {speculators_attention} attention; plain has
"{plain_attention}" attention; {dtype}, {threads} thread(s); medians of n.

Forward, backward, clipping and AdamW on T tokens with real ShareGPT masks. CPU is per second of
processor time. Step memory is the peak above the loaded memory. "Gradient" is the relative
difference of the first gradient of the fusion weight from ours.

{steps}

The matrix products that our step needs, and this machine's speed on them, measured between the
turns:

{bounds}
{published}"""


def commands(arguments: argparse.Namespace) -> Mapping[str, Sequence[str]]:
    """Return the command of each selected peer, without its case."""
    package = str(Path(arguments.speculators_venv or "") / "bin" / "python")
    attention = arguments.speculators_attention
    ways = {
        "eyas": (sys.executable, "eyas_step", "compile" if arguments.compile else ""),
        "plain": (sys.executable, "plain_step", arguments.plain_attention),
        "speculators": (package, "speculators_step", attention),
        "speculators+head": (package, "speculators_step", f"{attention}+head"),
    }
    limits = [f"--threads={arguments.threads}", f"--memory-gib={arguments.memory_gib}"]
    return {
        name: [python, "-m", f"benchmarks.{module}", f"--variant={variant}", *limits]
        for name, (python, module, variant) in ways.items()
        if name in arguments.peers
    }


def measure_case(case: StepCase, arguments: argparse.Namespace, *, seconds: float) -> CaseResult:
    """Let all peers take turns for about `seconds`, at least once each."""
    started = time.monotonic()
    names = list(commands(arguments))
    ready: dict[str, Ready] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    rate = ProductRate(cpu=0.0, wall=0.0)
    with _workers(case, arguments) as workers:
        for name, worker in workers.items():
            with _recording(failures, name):
                ready[name] = worker.ready(arguments.turn_seconds)
        for done in range(1, arguments.rounds + 1):
            begun = time.monotonic()
            for name in (name for name in names if name not in failures):
                with _recording(failures, name):
                    turns[name].append(workers[name].turn(arguments.turn_seconds))
            rate = rate.faster(product_rate(case.shape, getattr(torch, case.dtype), case.device))
            now = time.monotonic()
            if done < arguments.rounds and now + (now - begun) > started + seconds:
                break
    peers = {
        name: PeerResult(
            ready=ready.get(name), turns=tuple(turns[name]), failure=failures.get(name, "")
        )
        for name in names
    }
    return CaseResult(case=case, rate=rate, peers=peers)


@contextlib.contextmanager
def _workers(case: StepCase, arguments: argparse.Namespace) -> Iterator[Mapping[str, Worker]]:
    """Start all peers at once; they load in parallel."""
    environment = dict(os.environ)
    if not arguments.compile:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # eager, as on any CPU
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        case.write(folder / "case.json")
        yield {
            name: stack.enter_context(
                Worker(
                    [*command, str(folder / "case.json")],
                    log_path=folder / f"{name}.log",
                    environment=environment,
                )
            )
            for name, command in commands(arguments).items()
        }


@contextlib.contextmanager
def _recording(failures: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except PeerFailedError as error:
        failures[name] = str(error)


def measure(arguments: argparse.Namespace, console: Console) -> list[CaseResult]:
    """Measure every case, small ones first; the time that they leave goes to the others."""
    end = time.monotonic() + 60 * arguments.minutes
    cases = cases_of(arguments)
    results = []
    for number, case in enumerate(cases):
        share = _weight(case) / sum(map(_weight, cases[number:]))
        seconds = (end - time.monotonic()) * share
        results.append(measure_case(case, arguments, seconds=seconds))
        for line in step_rows(results[-1]):
            console.print(line, markup=False, soft_wrap=True, highlight=False)
    return results


def cases_of(arguments: argparse.Namespace) -> list[StepCase]:
    """Return the steps to measure, small ones first."""
    return [*_of_shapes(arguments), *_published(arguments)]


def _of_shapes(arguments: argparse.Namespace) -> list[StepCase]:
    if not arguments.shape:
        return []
    samples = sharegpt_samples(NUM_CONVERSATIONS)
    packs = {num_tokens: typical_pack(samples, num_tokens) for num_tokens in arguments.tokens}
    return [
        _case(shape, packs[num_tokens], ttt_length, arguments)
        for num_tokens, ttt_length, shape in product(
            sorted(arguments.tokens), sorted(arguments.ttt), arguments.shape
        )
    ]


def _published(arguments: argparse.Namespace) -> list[StepCase]:
    if not arguments.published:
        return []
    return [one.case(dtype=arguments.dtype, device=arguments.device) for one in PUBLISHED]


def _case(shape: str, pack: PackedMask, ttt_length: int, arguments: argparse.Namespace) -> StepCase:
    return StepCase(
        shape=SHAPES[shape],
        ttt_length=ttt_length,
        dtype=arguments.dtype,
        device=arguments.device,
        lengths=pack.lengths,
        loss_mask=pack.loss_mask,
    )


def _weight(case: StepCase) -> int:
    """Return the case's share of the time: less than proportional, so that small ones repeat."""
    return (case.num_tokens * case.ttt_length + 4000) * case.shape.hidden_size


def report(arguments: argparse.Namespace, results: Sequence[CaseResult]) -> str:
    """Return the report in Markdown."""
    return REPORT.format(
        command=_command(arguments),
        machine=_machine(arguments.device),
        speculators_attention=arguments.speculators_attention,
        plain_attention=arguments.plain_attention,
        dtype=arguments.dtype,
        threads=arguments.threads,
        steps="\n".join(step_table(results)),
        bounds="\n".join(bound_table(results, peak=arguments.peak_tflops * 1e12)),
        published=_published_part(results) if arguments.published else "",
    )


def _published_part(results: Sequence[CaseResult]) -> str:
    ours = [(result.case, result.peers[OURS]) for result in results if OURS in result.peers]
    measured = [(case, case.num_tokens / one.wall_seconds) for case, one in ours if one.turns]
    return "\nThe published shapes:\n\n" + "\n".join(published_table(measured)) + "\n"


def _machine(device: str) -> str:
    gpu = "" if device == "cpu" else f"{torch.cuda.get_device_name()}, "
    return gpu + describe(PACKAGES)


def _command(arguments: argparse.Namespace) -> str:
    """Return the command without paths, which mean nothing on another machine."""
    words = ["python", "-m", "benchmarks.train_step"]
    for name in ("shape", "tokens", "ttt", "peers"):
        words += [f"--{name}", *map(str, getattr(arguments, name))]
    words += ["--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    if arguments.device != "cpu":
        words += ["--device", arguments.device, "--peak-tflops", f"{arguments.peak_tflops:g}"]
    words += [f"--{name}" for name in ("compile", "published") if getattr(arguments, name)]
    words += ["--rounds", str(arguments.rounds), "--minutes", f"{arguments.minutes:g}"]
    return shlex.join(words)


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs="*", choices=sorted(SHAPES), default=["gemma", "llama"])
    add("--published", action="store_true", help="also the shapes whose speed SpecForge published")
    add("--tokens", nargs="+", type=int, default=[512, 2048], help="T")
    add("--ttt", nargs="+", type=int, default=[3, 7], help="training-time-test steps")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=2)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--compile", action="store_true", help="let steps use torch.compile")
    add("--peak-tflops", type=float, default=0.0, help="peak of the GPU, for its utilisation")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS[:3]))
    add("--plain-attention", choices=("columns", "dense"), default="columns")
    add("--speculators-attention", choices=("sdpa", "eager"), default="sdpa")
    add("--speculators-venv", type=Path, help="environment that has speculators 0.9.0")
    add("--rounds", type=int, default=5, help="at most; --minutes may allow fewer")
    add("--minutes", type=float, default=12.0, help="for all cases")
    add("--turn-seconds", type=float, default=180.0, help="limit of one peer's turn")
    add("--memory-gib", type=float, default=16.0, help="limit of one peer's data")
    add("--results", type=Path, help="also write the report to this file")
    arguments = parser.parse_args(command_line)
    if arguments.speculators_venv is None:
        arguments.peers = [name for name in arguments.peers if "speculators" not in name]
    elif not (arguments.speculators_venv / "bin" / "python").exists():
        parser.error(f"no bin/python in {arguments.speculators_venv}; see docs/training-step.md")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    return arguments


def main() -> None:
    """Print the report and write it to `--results`."""
    arguments = parse(sys.argv[1:])
    console = Console()
    torch.set_num_threads(arguments.threads)
    found = report(arguments, measure(arguments, console))
    console.print(found, markup=False, soft_wrap=True, highlight=False)
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
