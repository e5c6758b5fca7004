"""The target's own answers to prompts, decoded plainly: what later turns of a benchmark follow."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from eagle_core.decoding.speculative import generate_plain_batch
from eagle_core.decoding.target_cache import CachedTarget, CacheT
from eagle_core.evaluation.benchmarks.dialogue import Answer
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.measure_engine import engine_server
from eagle_core.serving.decode import decode_each
from eagle_core.serving.engine import Engine
from eagle_core.serving.served import Served


def answers_here(
    target: CachedTarget[CacheT],
    evaluation: EvaluationConfig,
    *,
    stop_ids: Collection[int],
    on_text: Callable[[], None] = lambda: None,
) -> Answer:
    """Return how this process answers prompts, `evaluation.batch_prompts` at a time."""

    def answer(prompts: Sequence[tuple[int, ...]]) -> list[Sequence[int]]:
        found: list[Sequence[int]] = []
        for first in range(0, len(prompts), evaluation.batch_prompts):
            batch = prompts[first : first + evaluation.batch_prompts]
            for trace in generate_plain_batch(target, batch, evaluation, stop_ids):
                found.append(trace.tokens)
                on_text()
        return found

    return answer


@contextmanager
def answers_by_engine(
    engine: Engine,
    served: Served,
    evaluation: EvaluationConfig,
    *,
    stop_ids: Collection[int],
    on_text: Callable[[], None] = lambda: None,
) -> Iterator[Answer]:
    """Yield how an engine answers prompts, one at a time, on a server that ends with the block.

    Raises:
        ConfigError: the engine refuses target or prompts.
        TransientError: the server died.

    """
    with engine_server(engine, replace(served, draft=None, draft_tokens=0, slots=1)) as decoder:

        def answer(prompts: Sequence[tuple[int, ...]]) -> list[Sequence[int]]:
            traces, _ = decode_each(
                decoder, prompts, evaluation, stop_ids, concurrency=1, on_text=on_text
            )
            return [trace.tokens for trace in traces]

        yield answer
