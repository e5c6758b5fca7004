"""The child process that decodes held-out prompts with drafts of a run that trains.

Sends one `DecodedLine` per `DecodeRequest`, and keeps the target loaded between them. It ignores
SIGTERM, which asks a run to stop and is often sent to all its processes: a run that stops records
what is being decoded. The parent kills it, and ends it by closing its standard input.
"""

import signal
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file

from eagle_core.training.decoded_points import Decoded
from flows.bridge.draft_decoder import DraftDecoder, DraftsToDecode
from flows.workers.channel import send, serve


class DecodeRequest(BaseModel):
    """One draft to decode with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    work: DraftsToDecode
    """The same in all requests."""
    weights_path: Path


class DecodedLine(BaseModel):
    """What decoding with it gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoded: Decoded


class _Server:
    """Keeps the target loaded."""

    def __init__(self) -> None:
        self._decoder: DraftDecoder | None = None

    def decode(self, request: DecodeRequest) -> None:
        """Decode with one draft."""
        self._decoder = self._decoder or DraftDecoder(request.work)
        send(DecodedLine(decoded=self._decoder.decode(load_file(request.weights_path))))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(serve(DecodeRequest, _Server().decode))
