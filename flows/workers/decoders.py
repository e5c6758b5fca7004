"""Decoders for a run that trains: in this process, or in a child process.

A child gets each draft in a file of the run's folder, and needs neither this process's time nor its
memory. It is started at the first draft.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from eagle_core.atomic_files import atomic_file
from eagle_core.errors import TransientError
from eagle_core.target.model import TargetModel
from eagle_core.training.decoded_points import Decoded
from eagle_core.training.draft_decoding import Decoder
from flows.bridge.draft_decoder import (
    VISIBLE_GPUS,
    DecodingPlace,
    DraftDecoder,
    DraftsToDecode,
)
from flows.errors import ChildKilledError
from flows.workers.child_process import Child
from flows.workers.decode_worker import DecodedLine, DecodeRequest

_SNAPSHOT_NAME = "decoding.safetensors"
_ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
"""A child of a rank is none itself."""


def child_environment(place: DecodingPlace) -> Mapping[str, str]:
    """Return the variables of a child: ranks on the CPU see no GPU, but their child may use one."""
    return {**_ONE_PROCESS, VISIBLE_GPUS: place.visible_gpus}


@contextmanager
def open_decoder(
    work: DraftsToDecode | None,
    run_path: Path,
    load_target: Callable[[], TargetModel] | None = None,
) -> Iterator[Decoder | None]:
    """Yield what decodes drafts of the run in `run_path`; None without work.

    Args:
        work: what to decode.
        run_path: folder of the run; a draft on its way to a child process is in it.
        load_target: returns the target, for decoding in this process; by default it is loaded.

    """
    if work is None:
        yield None
    elif not work.place.is_child:
        yield _DecoderHere(work, load_target)
    else:
        decoder = _ChildDecoder(work, run_path / _SNAPSHOT_NAME)
        try:
            yield decoder
        finally:
            decoder.close()


class _DecoderHere:
    """Decodes in this process, before `decode` returns."""

    is_awaited = True

    def __init__(self, work: DraftsToDecode, load_target: Callable[[], TargetModel] | None) -> None:
        self.prompts = work.digest
        self._decoder = DraftDecoder(work, load_target)

    def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":
        """Decode with a draft's weights."""
        result: Future[Decoded] = Future()
        result.set_result(self._decoder.decode(weights))
        return result


class _ChildDecoder:
    """Decodes in a child process, one draft at a time."""

    def __init__(self, work: DraftsToDecode, snapshot_path: Path) -> None:
        self.prompts, self.is_awaited = work.digest, work.place.is_awaited
        self._work, self._snapshot_path = work, snapshot_path
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")
        self._child: Child | None = None

    def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":
        """Begin to decode with a draft's weights; the last draft's result must be there."""
        with atomic_file(self._snapshot_path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
        self._child = self._child or Child(
            "flows.workers.decode_worker", environment=child_environment(self._work.place)
        )
        request = DecodeRequest(work=self._work, weights_path=self._snapshot_path)
        return self._reader.submit(_ask, self._child, request)

    def close(self) -> None:
        """End the child, and what it is decoding."""
        if self._child is not None:
            self._child.close(by=signal.SIGKILL)  # it ignores SIGTERM
        self._reader.shutdown()
        self._snapshot_path.unlink(missing_ok=True)


def _ask(child: Child, request: DecodeRequest) -> Decoded:
    what = (
        "decoding while training (the last checkpoint is good: run the same command again to "
        "resume; training.decode_every=0 trains without)"
    )
    try:
        (line,) = child.request(request, what=what)
    except ChildKilledError as error:  # of a rank, too: a rank reports errors of the core only
        raise TransientError(str(error)) from error
    return DecodedLine.model_validate_json(line).decoded
