"""Tokenise a stream of conversations in several processes, in order, in constant memory.

The samples are those of `ConversationTokenizer.tokenize_all`, in the same order, for any number of
processes. A bounded number of chunks is in flight, so neither input nor output accumulates.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from eagle_core.data.conversation import Conversation
from eagle_core.data.ledger import LedgerEntry, RejectedRecord
from eagle_core.errors import TransientError
from eagle_core.samples import TokenizedSample
from eagle_core.tokenization.conversation_tokenizer import (
    ConversationTokenizer,
    OnChanged,
    OnRejected,
)

_CHUNK = 64
_CHUNKS_PER_PROCESS = 3
_Chunk = tuple[list[TokenizedSample], list[RejectedRecord], list[LedgerEntry]]


def tokenize_in_processes(
    tokenizer: ConversationTokenizer,
    conversations: Iterable[Conversation],
    *,
    max_length: int,
    num_processes: int,
    min_supervised_tokens: int = 1,
    on_rejected: OnRejected | None = None,
    on_changed: OnChanged | None = None,
) -> Iterator[TokenizedSample]:
    """Yield samples of at most `max_length` tokens in the order of the conversations.

    One process means the calling one. `on_rejected` and `on_changed` are called there, in order.
    Raises `TransientError` if a process dies.
    """
    if num_processes == 1:
        yield from tokenizer.tokenize_all(
            conversations,
            max_length=max_length,
            min_supervised_tokens=min_supervised_tokens,
            on_rejected=on_rejected,
            on_changed=on_changed,
        )
        return
    reject = on_rejected or (lambda _rejected: None)
    change = on_changed or (lambda _entry: None)
    executor = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),  # tokenizers' threads rule out fork
        initializer=_start_worker,
        initargs=(tokenizer, max_length, min_supervised_tokens),
    )
    try:
        for samples, rejected, changed in _in_order(executor, conversations, num_processes):
            for one in rejected:
                reject(one)
            for entry in changed:
                change(entry)
            yield from samples
    except BrokenProcessPool as error:
        raise TransientError(
            "a tokenising process died, probably out of memory; run again, with a smaller "
            "dataset.tokenize_processes if it dies twice"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(
    executor: ProcessPoolExecutor, conversations: Iterable[Conversation], num_processes: int
) -> Iterator[_Chunk]:
    remaining = iter(conversations)
    in_flight: deque[Future[_Chunk]] = deque()
    while True:
        while len(in_flight) < num_processes * _CHUNKS_PER_PROCESS:
            chunk = list(islice(remaining, _CHUNK))
            if not chunk:
                break
            in_flight.append(executor.submit(_work, chunk))
        if not in_flight:
            return
        yield in_flight.popleft().result()


class _Worker:
    """State that a process keeps between chunks."""

    tokenizer: ConversationTokenizer
    max_length: int
    min_supervised_tokens: int


def _start_worker(
    tokenizer: ConversationTokenizer, max_length: int, min_supervised_tokens: int
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _Worker.tokenizer = tokenizer
    _Worker.max_length = max_length
    _Worker.min_supervised_tokens = min_supervised_tokens


def _work(chunk: list[Conversation]) -> _Chunk:
    rejected: list[RejectedRecord] = []
    changed: list[LedgerEntry] = []
    samples = _Worker.tokenizer.tokenize_all(
        chunk,
        max_length=_Worker.max_length,
        min_supervised_tokens=_Worker.min_supervised_tokens,
        on_rejected=rejected.append,
        on_changed=changed.append,
    )
    return list(samples), rejected, changed
