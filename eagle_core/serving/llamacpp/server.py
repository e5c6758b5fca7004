"""llama.cpp's server."""

import os
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.sampling import stream_seed
from eagle_core.decoding.sampling_limits import SamplingLimits
from eagle_core.decoding.trace import GenerationTrace, until_stop
from eagle_core.errors import ConfigError, TransientError
from eagle_core.serving.engine import Launch
from eagle_core.serving.events import post, post_stream
from eagle_core.serving.llamacpp import gguf, installed
from eagle_core.serving.llamacpp.draft_file import convert_draft
from eagle_core.serving.sent_text import SentRound, to_trace, tokens_to_ask
from eagle_core.serving.served import Served
from eagle_core.serving.template_file import template_file
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device

_PREFIX = "LLAMA_"
"""Of variables that set options of the server."""
_NO_LIMITS: Mapping[str, object] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "typical_p": 1.0,
}
"""By default some of these are the target's own, from its generation_config.json."""
_ORDER = ("penalties", "temperature", "top_k", "top_p")
_TIMEOUT_SECONDS = 60.0
_IN_FLOAT32 = {"--cache-type-k": "f32", "--cache-type-v": "f32", "--flash-attn": "off"}
"""By default its cache is float16, in which texts differ from the target's own."""


class LlamaCppEngine:
    """llama.cpp, from PATH or the user's cache."""

    def __init__(self, config: TargetConfig) -> None:
        """Find it.

        Raises:
            ConfigError: server or converter is not installed, or cannot run the target.

        """
        if config.quantization is not None:
            raise ConfigError(
                "target.quantization is vLLM's: choose engine vllm, or remove the setting"
            )
        self._server = installed.server()
        installed.converter()
        is_ours = installed.folder() in self._server.parents
        self.title = f"llama.cpp {installed.VERSION if is_ours else _version(self._server)}"

    def prepare(self, served: Served) -> None:
        """Convert target and draft, if need be."""
        gguf.target_file(served.target, served.weights)
        if served.draft is not None and not draft_path(served).exists():
            convert_draft(
                served.draft,
                draft_path(served),
                dtype=served.target.dtype,
                target=served.weights,
                trust_remote_code=served.target.trust_remote_code,
            )

    def launch(self, served: Served, *, port: int) -> Launch:
        """Return the command of its server."""
        config = served.target
        options = {
            "--model": str(gguf.target_path(config, served.weights)),
            "--alias": config.name,
            "--host": served.host,
            "--port": str(port),
            "--parallel": str(served.slots),
            "--ctx-size": str(served.slots * served.max_length),
        }
        if served.is_measured:  # a prompt takes as long as the one before
            options["--cache-ram"] = "0"
        if served.chat_template is not None:
            options["--chat-template-file"] = str(template_file(served.chat_template))
        if resolve_device(config.device).type == "cpu":
            options["--threads"] = str(torch.get_num_threads())
            options |= {"--gpu-layers": "0", "--device": "none"}
        if config.dtype == "float32":
            options.update(_IN_FLOAT32)
        if served.draft is not None:
            options |= {
                "--spec-type": "draft-eagle3",
                "--spec-draft-model": str(draft_path(served)),
                "--spec-draft-n-max": str(served.draft_tokens),
                "--spec-draft-p-min": f"{served.draft_p_min:g}",
            }
            if resolve_device(config.device).type == "cpu":
                options |= {"--spec-draft-ngl": "0", "--spec-draft-device": "none"}
            if config.dtype == "float32":
                options |= {"--spec-draft-type-k": "f32", "--spec-draft-type-v": "f32"}
        words = [word for option in options.items() for word in option]
        return Launch(
            command=(str(self._server), *words, "--metrics"),
            environment=_plain_environment(),
        )

    def decoder(self, client: httpx.Client, served: Served) -> "LlamaCppDecoder":
        """Return a decoder for its server."""
        return LlamaCppDecoder(client, served.draft_tokens)

    def samplers(self, served: Served, limits: SamplingLimits) -> Mapping[str, object]:
        """Return the limits under llama.cpp's names, in the order of the others.

        By default it limits before it divides by the temperature, and penalises only the last 64
        tokens.
        """
        return {
            **_NO_LIMITS,
            "top_p": limits.top_p,
            "top_k": limits.top_k or 0,
            "repeat_penalty": limits.repetition_penalty,
            "repeat_last_n": served.max_length,
            "samplers": _ORDER,
        }


@dataclass(frozen=True, slots=True)
class LlamaCppDecoder:
    """Decodes on llama.cpp's server, prompts and texts as token ids.

    The server sends each token by itself, with counts: a round is the tokens between two drafts.
    Tokens that end within a character are not sent; such a text is decoded once more, for its
    tokens.
    """

    client: httpx.Client
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
        counts_rounds = is_alone and self.draft_tokens > 0
        body = {
            "prompt": list(prompt),
            "n_predict": tokens_to_ask(
                config, draft_tokens=self.draft_tokens if counts_rounds else 0
            ),
            "temperature": config.temperature,
            **_NO_LIMITS,
            "seed": stream_seed(config.seed, prompt),
            "cache_prompt": False,
            "return_tokens": True,
        }
        if not counts_rounds:
            return self._decode_whole(body, config, stop_ids)
        streamed = {**body, "stream": True, "timings_per_token": True}
        events = list(post_stream(self.client, "/completion", streamed))
        sent = [_Sent.of(seconds, event) for seconds, event in events if event.get("tokens")]
        tokens = [one.token for one in sent if one.token is not None]
        seconds, last = events[-1]
        if last["tokens_predicted"] > len(sent):
            tokens = self._all_tokens(body, tokens)
            sent.append(_Sent.at_end(seconds, last))
        first, *rounds = _rounds(sent, tokens, self.draft_tokens)
        return to_trace(first.tokens, rounds, config, stop_ids, first_seconds=first.seconds)

    def _decode_whole(
        self, body: Mapping[str, object], config: DecodingConfig, stop_ids: Collection[int]
    ) -> GenerationTrace:
        started = time.perf_counter()
        answer = post(self.client, "/completion", body)
        tokens = until_stop(answer["tokens"], stop_ids)
        return GenerationTrace(
            tokens=tuple(tokens)[: config.max_new_tokens],
            seconds=time.perf_counter() - started,
            prefill_seconds=answer["timings"]["prompt_ms"] / 1000,
        )

    def _all_tokens(self, body: Mapping[str, object], sent: Sequence[int]) -> list[int]:
        """Return the tokens of a text, those that were not sent included."""
        tokens: list[int] = post(self.client, "/completion", body)["tokens"]
        following = iter(tokens)
        if not all(token in following for token in sent):
            raise TransientError(
                "llama.cpp wrote another text for the same prompt, and did not send all of the "
                "first: set target.dtype to float32, or evaluation.temperature to 0"
            )
        return tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    """A token as it was sent, and the counts of its text up to then."""

    token: int | None
    """None at the end of a text."""
    num_tokens: int
    drafted: int
    accepted: int
    seconds: float

    @classmethod
    def of(cls, seconds: float, event: Mapping[str, Any]) -> "_Sent":
        return cls.at_end(seconds, event, token=event["tokens"][0])

    @classmethod
    def at_end(
        cls, seconds: float, event: Mapping[str, Any], *, token: int | None = None
    ) -> "_Sent":
        timings = event["timings"]
        return cls(
            token=token,
            num_tokens=timings["predicted_n"],
            drafted=timings.get("draft_n", 0),
            accepted=timings.get("draft_n_accepted", 0),
            seconds=seconds,
        )


def _rounds(sent: Sequence[_Sent], tokens: Sequence[int], draft_tokens: int) -> list[SentRound]:
    """Return the prefill's token as a round of its own, and the rounds after it.

    A forward without a draft is a round too: its draft was too unsure. Of rounds without a sent
    token only the sums are known; they are taken to accept as little as these allow, in order.
    """
    found: list[SentRound] = []
    drafted = accepted = done = 0
    for one in sent:
        while one.num_tokens > done:
            num_drafted = min(one.drafted - drafted, draft_tokens)
            others = one.drafted - drafted - num_drafted  # of later rounds, which may take as many
            num_accepted = max(one.accepted - accepted - others, 0)
            found.append(
                SentRound(
                    tokens=tuple(tokens[done : done + num_accepted + 1]),
                    accepted=num_accepted,
                    drafted=num_drafted,
                    seconds=one.seconds,
                )
            )
            drafted, accepted = drafted + num_drafted, accepted + num_accepted
            done += num_accepted + 1
    return found


def draft_path(served: Served) -> Path:
    """Return the file of a draft: itself, or beside the folder of its export.

    Beside it, its name has the dtype, and a digest of the target and of llama.cpp's version.
    """
    draft = served.draft
    assert draft is not None  # noqa: S101
    if draft.is_file():
        return draft
    return draft.parent / f"draft-{gguf.file_suffix(served.target, served.weights)}"


def _plain_environment() -> dict[str, str]:
    """Return the variables of this process without those that the server takes for options."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}


def _version(server: Path) -> str:
    """Return the version that a server prints."""
    try:
        done = subprocess.run(
            [server, "--version"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{server} does not run: {error}; install another llama.cpp") from error
    printed = done.stdout + done.stderr
    words = next((line.split() for line in printed.splitlines() if "version:" in line), [])
    return words[1] if len(words) > 1 else "of unknown version"
