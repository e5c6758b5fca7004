"""What an engine is to the others: a command that serves, and a decoder that asks it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import httpx

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.sampling_limits import SamplingLimits
from eagle_core.decoding.trace import GenerationTrace
from eagle_core.serving.served import Served


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a server is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    """All variables of the process."""


class EngineDecoder(Protocol):
    """Decodes texts on a server."""

    def decode(
        self,
        prompt: Sequence[int],
        config: DecodingConfig,
        stop_ids: Collection[int],
        *,
        is_alone: bool,
    ) -> GenerationTrace:
        """Return the text after a prompt, up to a stop token or `max_new_tokens`.

        `is_alone` says that no other text is decoded meanwhile: some engines count rounds only for
        all texts together, and then return none.

        Raises:
            TransientError: the server does not answer.
            ConfigError: the server refuses the request.

        """
        ...


class Engine(Protocol):
    """An engine that is installed here."""

    @property
    def title(self) -> str:
        """Name and version."""
        ...

    def prepare(self, served: Served) -> None:
        """Make the files that it needs.

        Raises:
            ConfigError: this engine cannot serve that.

        """
        ...

    def launch(self, served: Served, *, port: int) -> Launch:
        """Return how to serve on a port, after `prepare`."""
        ...

    def decoder(self, client: httpx.Client, served: Served) -> EngineDecoder:
        """Return a decoder for a running server; `client` has its address."""
        ...

    def samplers(self, served: Served, limits: SamplingLimits) -> Mapping[str, object]:
        """Return the limits under this engine's names, for the body of a request.

        Other limits that it has are set to neutral: some are the target's own by default.
        """
        ...
