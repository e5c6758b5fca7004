"""llama.cpp's server."""

import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.trace import GenerationTrace
from eagle_core.errors import ConfigError
from eagle_core.serving.engine import Launch
from eagle_core.serving.events import post_stream
from eagle_core.serving.llamacpp import gguf, installed
from eagle_core.serving.sent_text import SentRound, to_trace, tokens_to_ask
from eagle_core.serving.served import Served
from eagle_core.serving.server_process import LOOPBACK
from eagle_core.target.model_config import resolve_device

DRAFT_NAME = "draft.gguf"
_TIMEOUT_SECONDS = 60.0
_IN_FLOAT32 = {"--cache-type-k": "f32", "--cache-type-v": "f32", "--flash-attn": "off"}
"""By default its cache is float16, in which texts differ from the target's own."""


class LlamaCppEngine:
    """llama.cpp, from PATH or the user's cache."""

    def __init__(self) -> None:
        """Find it.

        Raises:
            ConfigError: it is not installed.

        """
        self._server = installed.server()
        is_ours = installed.folder() in self._server.parents
        self.title = f"llama.cpp {installed.VERSION if is_ours else _version(self._server)}"

    def launch(self, served: Served, *, port: int) -> Launch:
        """Return the command of its server; target and draft are converted if need be."""
        config = served.target
        if config.quantization is not None:
            raise ConfigError(
                "target.quantization is vLLM's: choose engine vllm, or remove the setting"
            )
        options = {
            "--model": str(gguf.target_file(config, served.weights)),
            "--alias": config.name,
            "--host": LOOPBACK,
            "--port": str(port),
            "--parallel": str(served.slots),
            "--ctx-size": str(served.slots * served.max_length),
            "--cache-ram": "0",  # a prompt takes as long as the one before
        }
        if resolve_device(config.device).type == "cpu":
            options["--threads"] = str(torch.get_num_threads())
            options["--gpu-layers"] = "0"
        if config.dtype == "float32":
            options.update(_IN_FLOAT32)
        if served.draft is not None:
            draft = served.draft.parent / DRAFT_NAME
            gguf.convert(served.draft, draft, dtype=config.dtype, target=served.weights)
            options |= {
                "--spec-type": "draft-eagle3",
                "--spec-draft-model": str(draft),
                "--spec-draft-n-max": str(served.draft_tokens),
                "--spec-draft-p-min": str(served.least_probability),
            }
            if config.dtype == "float32":
                options |= {"--spec-draft-type-k": "f32", "--spec-draft-type-v": "f32"}
        words = [word for option in options.items() for word in option]
        return Launch(
            command=(str(self._server), *words, "--metrics"),
            variables={},
            environment=dict(os.environ),
        )

    def decoder(self, client: httpx.Client, served: Served) -> "LlamaCppDecoder":
        """Return a decoder for its server."""
        return LlamaCppDecoder(client, served.draft_tokens)


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
        """Return the text after a prompt, with its rounds."""
        asked = tokens_to_ask(config, draft_tokens=self.draft_tokens if is_alone else 0)
        body = {
            "prompt": list(prompt),
            "n_predict": asked,
            "temperature": config.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": config.seed,
            "cache_prompt": False,
            "return_tokens": True,
        }
        streamed = {**body, "stream": True, "timings_per_token": True}
        sent = [
            _Sent.of(seconds, event)
            for seconds, event in post_stream(self.client, "/completion", streamed)
            if event.get("tokens") and not event.get("stop")
        ]
        tokens = [one.token for one in sent]
        if sent[-1].num_tokens > len(sent):
            answer = self.client.post("/completion", json=body).raise_for_status().json()
            tokens = answer["tokens"]
        first, *rounds = _rounds(sent, tokens, self.draft_tokens)
        trace = to_trace(first.tokens, rounds, config, stop_ids, first_seconds=first.seconds)
        return trace if self.draft_tokens else replace(trace, rounds=())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    """A token as it was sent, and the counts of its text up to then."""

    token: int
    num_tokens: int
    drafted: int
    accepted: int
    seconds: float

    @classmethod
    def of(cls, seconds: float, event: Mapping[str, Any]) -> "_Sent":
        timings = event["timings"]
        return cls(
            token=event["tokens"][0],
            num_tokens=timings["predicted_n"],
            drafted=timings.get("draft_n", 0),
            accepted=timings.get("draft_n_accepted", 0),
            seconds=seconds,
        )


def _rounds(sent: Sequence[_Sent], tokens: Sequence[int], draft_tokens: int) -> list[SentRound]:
    """Return the prefill's token as a round of its own, and the rounds after it.

    A forward without a draft is a round too: its draft was too unsure. A round of which no token
    was sent is known by its draft only, and is taken for one whose draft was rejected.
    """
    found: list[SentRound] = []
    drafted = accepted = done = 0
    for one in sent:
        while one.num_tokens > done:
            is_unsent = one.drafted - drafted > draft_tokens
            num_drafted = draft_tokens if is_unsent else one.drafted - drafted
            num_accepted = 0 if is_unsent else one.accepted - accepted
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
