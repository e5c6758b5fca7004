"""Decode prompts on an engine with a draft and without, at several settings and concurrencies.

Greedy texts of a server need not be those of another concurrency: in bfloat16 rounding depends on
what is computed together. Acceptance is therefore counted one prompt at a time.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from eagle_core.decoding.trace import GenerationTrace
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import PromptResult, summarise
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import (
    DraftSetting,
    EngineReport,
    EngineSpeed,
    SettingAcceptance,
)
from eagle_core.evaluation.prompts import Prompt
from eagle_core.serving.decode import decode_each, warm_up
from eagle_core.serving.engine import Engine, EngineDecoder
from eagle_core.serving.served import Served
from eagle_core.serving.server_process import serving


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineResult:
    """What was measured."""

    results: list[PromptResult]
    """Prompt by prompt, one at a time, with `headline_setting`."""
    report: EngineReport


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The texts of one server, by concurrency."""

    traces: dict[int, list[GenerationTrace]]
    tokens_per_second: dict[int, float]

    def prefill_share(self, concurrency: int) -> float:
        """Return the part of the texts' time before their first token."""
        texts = self.traces[concurrency]
        return sum(text.prefill_seconds for text in texts) / sum(text.seconds for text in texts)


def num_texts(num_prompts: int, evaluation: EvaluationConfig) -> int:
    """Return how many texts a measurement decodes."""
    servers = 1 + len(draft_settings(evaluation))
    return servers * len(concurrencies(evaluation, num_prompts)) * num_prompts


def draft_lengths(evaluation: EvaluationConfig) -> list[int]:
    """Return the numbers of drafted tokens to measure, ascending."""
    return sorted({*evaluation.draft_lengths, evaluation.draft_tokens})


def draft_settings(evaluation: EvaluationConfig) -> list[DraftSetting]:
    """Return the settings to measure, ascending."""
    return sorted(
        DraftSetting(draft_tokens=length, p_min=p_min)
        for length in draft_lengths(evaluation)
        for p_min in set(evaluation.draft_p_min)
    )


def headline_setting(evaluation: EvaluationConfig) -> DraftSetting:
    """Return the setting of the acceptance results: `draft_tokens`, cut as little as measured."""
    return DraftSetting(draft_tokens=evaluation.draft_tokens, p_min=min(evaluation.draft_p_min))


def concurrencies(evaluation: EvaluationConfig, num_prompts: int) -> list[int]:
    """Return the numbers of prompts at a time to measure, ascending; 1 is always one of them.

    There are no more than prompts.
    """
    return sorted({*(min(number, num_prompts) for number in evaluation.concurrency), 1})


def measure_engine(
    engine: Engine,
    served: Served,
    prompts: Sequence[Prompt],
    evaluation: EvaluationConfig,
    *,
    stop_ids: Collection[int] = (),
    on_text: Callable[[], None] = lambda: None,
) -> EngineResult:
    """Start one server without the draft of `served` and one for each setting; return figures.

    Raises:
        ConfigError: there is no prompt, or the engine refuses target, draft or prompts.
        TransientError: a server died.

    """
    chosen = prompts[: evaluation.num_prompts]
    if not chosen:
        raise ConfigError(
            "no held-out prompt is left to evaluate; raise max_prompt_tokens or enlarge the split"
        )

    def decoded(part: Served, config: EvaluationConfig) -> _Decoded:
        with engine_server(engine, part) as decoder:
            return _decode(decoder, chosen, config, stop_ids, on_text)

    plain = decoded(replace(served, draft=None, draft_tokens=0), evaluation)
    with_draft = {
        setting: decoded(
            replace(served, draft_tokens=setting.draft_tokens, draft_p_min=setting.p_min),
            evaluation.model_copy(update={"draft_tokens": setting.draft_tokens}),
        )
        for setting in draft_settings(evaluation)
    }
    results = {
        setting: _results(chosen, found.traces[1], plain.traces[1], evaluation)
        for setting, found in with_draft.items()
    }
    reports = {
        setting: summarise(found, draft_tokens=setting.draft_tokens)
        for setting, found in results.items()
    }
    return EngineResult(
        results=results[headline_setting(evaluation)],
        report=EngineReport(
            engine=engine.title,
            dtype=served.target.dtype,
            acceptances=tuple(
                SettingAcceptance(setting=setting, report=report)
                for setting, report in reports.items()
            ),
            speeds=tuple(
                EngineSpeed(
                    setting=setting,
                    concurrency=concurrency,
                    tokens_per_second=found.tokens_per_second[concurrency],
                    plain_tokens_per_second=plain.tokens_per_second[concurrency],
                    num_matching=None
                    if evaluation.temperature
                    else _num_equal(found.traces[concurrency], plain.traces[concurrency]),
                    acceptance_length=reports[setting].acceptance_length,
                    prefill_share=found.prefill_share(concurrency),
                )
                for setting, found in with_draft.items()
                for concurrency in concurrencies(evaluation, len(chosen))
            ),
        ),
    )


@contextmanager
def engine_server(engine: Engine, served: Served) -> Iterator[EngineDecoder]:
    """Yield the decoder of a server that ends with the block.

    Raises:
        ConfigError: the engine refuses target or draft.
        TransientError: the server died.

    """
    engine.prepare(served)
    with (
        serving(engine.title, lambda port: engine.launch(served, port=port)) as server,
        server.client() as client,
    ):
        yield engine.decoder(client, served)


def _decode(
    decoder: EngineDecoder,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    stop_ids: Collection[int],
    on_text: Callable[[], None],
) -> _Decoded:
    ids = [prompt.input_ids for prompt in prompts]
    warm_up(decoder, ids[0], config)
    found = _Decoded({}, {})
    for concurrency in concurrencies(config, len(ids)):
        traces, rate = decode_each(
            decoder, ids, config, stop_ids, concurrency=concurrency, on_text=on_text
        )
        found.traces[concurrency], found.tokens_per_second[concurrency] = traces, rate
    return found


def _results(
    prompts: Sequence[Prompt],
    texts: Sequence[GenerationTrace],
    plain_texts: Sequence[GenerationTrace],
    evaluation: EvaluationConfig,
) -> list[PromptResult]:
    return [
        PromptResult(
            speculative=text,
            plain=plain,
            sampled=evaluation.temperature > 0,
            category=prompt.category,
        )
        for prompt, text, plain in zip(prompts, texts, plain_texts, strict=True)
    ]


def _num_equal(texts: Sequence[GenerationTrace], others: Sequence[GenerationTrace]) -> int:
    return sum(text.tokens == other.tokens for text, other in zip(texts, others, strict=True))
