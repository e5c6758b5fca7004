"""Decode prompts on a server, a number of them at a time."""

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.trace import GenerationTrace
from eagle_core.serving.engine import EngineDecoder

_WARM_UP_TOKENS = 2


def warm_up(decoder: EngineDecoder, prompt: Sequence[int], config: DecodingConfig) -> None:
    """Decode a few tokens, else the first prompt pays for it."""
    short = config.model_copy(update={"max_new_tokens": _WARM_UP_TOKENS})
    decoder.decode(prompt, short, (), is_alone=False)


def decode_each(
    decoder: EngineDecoder,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: Collection[int],
    *,
    concurrency: int,
    on_text: Callable[[], None],
) -> tuple[list[GenerationTrace], float]:
    """Return the traces in the order of the prompts, and the tokens per second of all together.

    At a concurrency of 1 they also have the rounds, and only the time of their own counts.
    """
    started = time.perf_counter()

    def decode(prompt: Sequence[int]) -> GenerationTrace:
        return decoder.decode(prompt, config, stop_ids, is_alone=concurrency == 1)

    traces = []
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="prompt")
    try:
        for trace in pool.map(decode, prompts):
            traces.append(trace)
            on_text()
    finally:  # an interruption does not wait for texts: the server ends, and with it they do
        pool.shutdown(wait=False, cancel_futures=True)
    elapsed = time.perf_counter() - started
    if concurrency == 1:
        elapsed = sum(trace.seconds for trace in traces)
    return traces, sum(len(trace.tokens) for trace in traces) / elapsed
