"""vLLM's server, in the Python that has vLLM."""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.sampling import stream_seed
from eagle_core.decoding.sampling_limits import SamplingLimits
from eagle_core.decoding.trace import GenerationTrace, until_stop
from eagle_core.draft.importing import read_draft_config
from eagle_core.draft.readers import require_reader
from eagle_core.serving.engine import Launch
from eagle_core.serving.events import post_stream
from eagle_core.serving.round_counts import RoundCounts
from eagle_core.serving.sent_text import SentRound, to_trace, tokens_to_ask
from eagle_core.serving.served import Served
from eagle_core.serving.template_file import template_file
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_python import environment_on, require_vllm, vllm_version
from eagle_core.target.model_config import resolve_device

_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""Of an engine that is no server."""
_KEY = "VLLM_API_KEY"  # a variable: a server of ours asks for none
_COUNT_SECONDS = 5.0
_PAUSE_SECONDS = 0.01

_Chunk = tuple[float, tuple[int, ...]]
"""Seconds since the request, and the tokens that came then."""


class VllmEngine:
    """vLLM, in the environment of `target.vllm_python`."""

    def __init__(self, config: TargetConfig) -> None:
        """Find it.

        Raises:
            ConfigError: it is not installed there, or not in `target.vllm_version`.

        """
        require_vllm(config)
        self.title = f"vLLM {vllm_version(config)}"

    def prepare(self, served: Served) -> None:
        """Check the draft: vLLM reads weights as they are."""
        if served.draft is not None:
            require_reader("vllm", read_draft_config(served.draft))

    @staticmethod
    def launch(served: Served, *, port: int) -> Launch:
        """Return the command of vLLM's OpenAI-compatible server; it need not be installed."""
        config, device = served.target, resolve_device(served.target.device)
        options = {
            "--model": str(served.weights),
            "--served-model-name": config.name,
            "--host": served.host,
            "--port": str(port),
            "--dtype": config.dtype,
            "--max-model-len": str(served.max_length),
            "--max-num-seqs": str(served.slots),
            "--max-num-batched-tokens": str(max(config.max_num_batched_tokens, served.max_length)),
            "--tensor-parallel-size": str(config.tensor_parallel),
            "--gpu-memory-utilization": str(config.gpu_memory_utilization),
        }
        if served.is_measured:  # no penalties or limits of the target's own file
            options["--generation-config"] = "vllm"
        if config.quantization is not None:
            options["--quantization"] = config.quantization
        if served.draft is not None:
            draft = {
                "method": "eagle3",
                "model": str(served.draft),
                "num_speculative_tokens": served.draft_tokens,
            }
            options["--speculative-config"] = json.dumps(draft)
        if served.chat_template is not None:
            options["--chat-template"] = str(template_file(served.chat_template))
        if served.reasoning_parser is not None:
            options["--reasoning-parser"] = served.reasoning_parser
        flags = []
        if served.tool_parser is not None:
            options["--tool-call-parser"] = served.tool_parser
            flags.append("--enable-auto-tool-choice")
        if served.is_measured:  # a prompt takes as long as the one before
            flags.append("--no-enable-prefix-caching")
        flags += ["--trust-remote-code"] if config.trust_remote_code else []
        flags += ["--enforce-eager"] if device.type == "cpu" else []
        python = Path(config.vllm_python).expanduser().absolute()
        words = [word for option in options.items() for word in option]
        environment = environment_on(config, device)
        environment.pop(_IN_PROCESS, None)
        environment.pop(_KEY, None)
        return Launch(
            command=(str(python), "-m", "vllm.entrypoints.openai.api_server", *words, *flags),
            environment=environment,
        )

    def decoder(self, client: httpx.Client, served: Served) -> "VllmDecoder":
        """Return a decoder for its server."""
        return VllmDecoder(client, served.target.name, served.draft_tokens)

    def samplers(
        self,
        served: Served,  # noqa: ARG002 (of the protocol)
        limits: SamplingLimits,
    ) -> Mapping[str, object]:
        """Return the limits under vLLM's names."""
        return {
            "top_p": limits.top_p,
            "top_k": limits.top_k or 0,
            "min_p": 0.0,
            "repetition_penalty": limits.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }


@dataclass(frozen=True, slots=True)
class VllmDecoder:
    """Decodes on vLLM's server, prompts and texts as token ids."""

    client: httpx.Client
    model: str
    draft_tokens: int

    def decode(
        self,
        prompt: Sequence[int],
        config: DecodingConfig,
        stop_ids: Collection[int],
        *,
        is_alone: bool,
    ) -> GenerationTrace:
        """Return the text after a prompt; its rounds only if no other text is decoded meanwhile."""
        if not (is_alone and self.draft_tokens):
            chunks = self._chunks(prompt, config, stop_ids, asked=config.max_new_tokens)
            return _whole(chunks, config, stop_ids)
        before = self._count()
        asked = tokens_to_ask(config, draft_tokens=self.draft_tokens)
        chunks = self._chunks(prompt, config, stop_ids, asked=asked)
        num_tokens = sum(len(chunk) for _, chunk in chunks)
        counted = self._count_of(num_tokens, before)
        (first_seconds, first), *others = chunks
        rounds = self._rounds(others, counted)
        if rounds is not None:
            return to_trace(first, rounds, config, stop_ids, first_seconds=first_seconds)
        whole = _whole(chunks, config, stop_ids)
        return replace(  # chunks were sent together: only the counts are known
            whole,
            rounds=tuple(counted.as_rounds()),
            seconds=whole.seconds * min(1.0, config.max_new_tokens / num_tokens),
        )

    def _chunks(
        self,
        prompt: Sequence[int],
        config: DecodingConfig,
        stop_ids: Collection[int],
        *,
        asked: int,
    ) -> list[_Chunk]:
        """Return the tokens of a text as they were sent."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": asked,
            "temperature": config.temperature,
            "seed": stream_seed(config.seed, prompt),
            "ignore_eos": True,  # the stop tokens are ours
            "stop_token_ids": sorted(stop_ids),
            "return_token_ids": True,
            "stream": True,
        }
        return [
            (seconds, tuple(event["choices"][0]["token_ids"]))
            for seconds, event in post_stream(self.client, "/v1/completions", body)
            if event["choices"] and event["choices"][0].get("token_ids")
        ]

    def _rounds(self, chunks: Sequence[_Chunk], counted: RoundCounts) -> list[SentRound] | None:
        """Return the rounds, each of which was one chunk; None if some were sent together."""
        if len(chunks) != counted.rounds:
            return None
        accepted = [len(chunk) - 1 for _, chunk in chunks]
        if accepted:  # after a stop token, and beyond the limit, tokens count but are not sent
            accepted[-1] = counted.num_accepted - sum(accepted[:-1])
        return [
            SentRound(
                tokens=chunk, accepted=num_accepted, drafted=self.draft_tokens, seconds=seconds
            )
            for (seconds, chunk), num_accepted in zip(chunks, accepted, strict=True)
        ]

    def _count(self) -> RoundCounts:
        return RoundCounts.read(self.client, draft_tokens=self.draft_tokens)

    def _count_of(self, num_tokens: int, before: RoundCounts) -> RoundCounts:
        """Return the counts of a text, which the server may know only after its last chunk."""
        deadline = time.monotonic() + _COUNT_SECONDS
        while True:
            counted = self._count().since(before)
            enough = 1 + counted.rounds + counted.num_accepted >= num_tokens
            if enough or time.monotonic() > deadline:
                return counted
            time.sleep(_PAUSE_SECONDS)


def _whole(
    chunks: Sequence[_Chunk], config: DecodingConfig, stop_ids: Collection[int]
) -> GenerationTrace:
    """Return a text without its rounds."""
    tokens = tuple(token for _, chunk in chunks for token in chunk)
    return GenerationTrace(
        tokens=tuple(until_stop(tokens, stop_ids))[: config.max_new_tokens],
        seconds=chunks[-1][0],
        prefill_seconds=chunks[0][0],
    )
