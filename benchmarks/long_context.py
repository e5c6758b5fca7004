"""The training step on one long sample: speed and memory by its length.

Run: python -m benchmarks.long_context --results FILE

A sample of T tokens is a prompt and an answer of a quarter of it, all of whose positions count. The
step is the trainer's (`benchmarks.step_worker`: forward, backward, clipping, AdamW). Settings:

* `all before`: every token sees all tokens before it.
* `window`: `draft.sliding_window`.
* `window, positions`: the same, and `training.max_positions_per_sample`.

Each case runs in a separate process. One that is late or does not fit has the reason in its row.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.step_case import SHAPES, StepCase
from benchmarks.step_worker import PeerFailedError, Turn, Worker

ANSWER_SHARE = 4
"""The answer is this part of the sample."""
REPORT = """\
# The training step on long samples

`python -m benchmarks.long_context`: {machine}. {shape}, TTT length {ttt}, {dtype}, {threads}
thread(s); medians of n. One sample of T tokens; its last quarter is the answer.

| T | sees | n | tokens/s | seconds per step | step memory, loaded |
|---|---|---|---|---|---|
{rows}

Step memory is the peak above what was loaded: weights, optimizer state, and the sample's states.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One case."""

    num_tokens: int
    title: str
    loaded_bytes: int = 0
    turns: list[Turn] = field(default_factory=list)
    failure: str = ""

    def row(self) -> str:
        """Return its row of the table."""
        start = f"| {self.num_tokens:,} | {self.title} | {len(self.turns)} |"
        if not self.turns:
            return f"{start} {self.failure} | | |"
        seconds = statistics.median(turn.wall_seconds for turn in self.turns)
        peak = max(turn.step_bytes for turn in self.turns)
        memory = f"{peak / 2**30:.2f}, {self.loaded_bytes / 2**30:.2f} GiB"
        return f"{start} {self.num_tokens / seconds:,.0f} | {seconds:.1f} | {memory} |"


def variants(window: int, positions: int) -> dict[str, str]:
    """Return the settings to compare: the variant of `benchmarks.eyas_step` by title."""
    return {
        "all before": "",
        f"window of {window:,}": f"window={window}",
        f"window of {window:,}, {positions:,} positions": f"window={window},positions={positions}",
    }


def long_case(num_tokens: int, *, shape: str, ttt_length: int, dtype: str) -> StepCase:
    """Return the step on one sample."""
    answer = num_tokens // ANSWER_SHARE
    return StepCase(
        shape=SHAPES[shape],
        ttt_length=ttt_length,
        dtype=dtype,
        lengths=(num_tokens,),
        loss_mask=(False,) * (num_tokens - answer) + (True,) * answer,
    )


def measure(case: StepCase, title: str, variant: str, arguments: argparse.Namespace) -> Result:
    """Run the rounds of a case in a process of its own."""
    result = Result(num_tokens=case.num_tokens, title=title)
    with _worker(case, variant, arguments) as worker:
        try:
            loaded = worker.ready(arguments.turn_seconds).loaded_bytes
            for _ in range(arguments.rounds):
                result.turns.append(worker.turn(arguments.turn_seconds))
        except PeerFailedError as error:
            return Result(
                num_tokens=case.num_tokens, title=title, turns=result.turns, failure=str(error)
            )
    return Result(num_tokens=case.num_tokens, title=title, loaded_bytes=loaded, turns=result.turns)


@contextlib.contextmanager
def _worker(case: StepCase, variant: str, arguments: argparse.Namespace) -> Iterator[Worker]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.write(folder / "case.json")
        command = [
            *(sys.executable, "-m", "benchmarks.eyas_step", f"--variant={variant}"),
            *(f"--threads={arguments.threads}", f"--memory-gib={arguments.memory_gib}"),
            str(folder / "case.json"),
        ]
        environment = dict(os.environ, TORCHDYNAMO_DISABLE="1")
        with Worker(command, log_path=folder / "log", environment=environment) as worker:
            yield worker


def report(results: Sequence[Result], arguments: argparse.Namespace) -> str:
    """Return the report in Markdown."""
    return REPORT.format(
        machine=describe(("torch",)),
        shape=arguments.shape,
        ttt=arguments.ttt,
        dtype=arguments.dtype,
        threads=arguments.threads,
        rows="\n".join(result.row() for result in results),
    )


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", nargs="+", type=int, default=[2048, 8192, 32768, 65536], help="T")
    add("--shape", choices=sorted(SHAPES), default="smollm2")
    add("--ttt", type=int, default=5, help="training-time-test steps")
    add("--window", type=int, default=1024)
    add("--positions", type=int, default=1024)
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=2)
    add("--turn-seconds", type=float, default=240.0, help="limit of one step")
    add("--memory-gib", type=float, default=16.0, help="limit of a process's data")
    add("--results", type=Path, help="also write the report to this file")
    return parser.parse_args(command_line)


def main() -> None:
    """Print the report and write it to `--results`."""
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    console = Console()
    results = []
    for num_tokens in sorted(arguments.tokens):
        case = long_case(
            num_tokens, shape=arguments.shape, ttt_length=arguments.ttt, dtype=arguments.dtype
        )
        for title, variant in variants(arguments.window, arguments.positions).items():
            results.append(measure(case, title, variant, arguments))
            console.print(results[-1].row(), markup=False, soft_wrap=True, highlight=False)
    found = report(results, arguments)
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
