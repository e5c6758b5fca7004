"""The process in which vLLM runs a target: started, asked, and watched from here.

It runs in another Python, which has vLLM, and reads and writes lines of JSON. States come in files
of a temporary folder, each removed when it is read.

Shapes: T tokens, S captured states, H hidden size.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from eagle_core.errors import ConfigError, DiskError, TransientError
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_python import environment_on, require_vllm
from eagle_core.target.model_config import target_dtype, with_dtype

_PROGRAM = Path(__file__).parent / "in_vllm" / "eyas_engine.py"
_TAIL_LINES = 12
_KILLS = (-signal.SIGKILL, -signal.SIGTERM)
"""By others. vLLM would die of another signal again."""
_NO_MEMORY = "Free memory on device"
_MEMORY = "OutOfMemoryError"
_NOT_WRITTEN = "its states cannot be written"
"""In what vLLM or its program says: others still use the GPU; a step took too much; a full disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStates:
    """What vLLM computed for a prompt."""

    states: Tensor
    """[T, S, H] the captured outputs, by layer."""
    token: int
    """The token that vLLM itself would write next."""
    logprob: float
    """vLLM's own log-probability (nats) of `token`."""


class VllmProcess:
    """A process with the target loaded in vLLM, which captures the outputs of some layers."""

    def __init__(
        self,
        config: TargetConfig,
        weights: Path,
        *,
        device: torch.device,
        outputs: Sequence[int],
    ) -> None:
        """Start it, and wait until the target is loaded.

        Args:
            config: the target.
            weights: its folder.
            device: where it runs.
            outputs: ascending; 0 is the embedding, j the output of layer j - 1.

        Raises:
            ConfigError: vLLM cannot run this target, or not here; gives its reason.
            TransientError: the process was killed, or the GPU is still used by another.

        """
        require_vllm(config)
        environment = environment_on(config, device)
        self.outputs = tuple(outputs)
        self._name, self._dtype = config.name, target_dtype(config)
        folder = Path(tempfile.mkdtemp(prefix="eyas-vllm-"))
        for name in ("states", "sockets"):
            (folder / name).mkdir()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see `_end`)
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading, encoding="utf-8")
        self._process = subprocess.Popen(
            [Path(config.vllm_python).expanduser(), _PROGRAM, str(writing)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=[writing],
            start_new_session=True,  # signals are for us; vLLM's own processes end with it
            env={**environment, "VLLM_RPC_BASE_PATH": str(folder / "sockets")},
        )
        os.close(writing)
        self._finalizer = weakref.finalize(
            self, _end, self._process, self._answers, self._log, folder
        )
        self._has_answered = self.is_idle = False
        settings = {
            "folder": str(folder),
            "outputs": self.outputs,
            "engine": _engine_settings(config, weights, device),
        }
        self._send(settings)
        self.max_length: int = self._receive()["max_length"]
        self.is_idle = True

    def run(self, prompts: Sequence[Sequence[int]]) -> Iterator[EngineStates]:
        """Yield the states of each prompt, in order.

        All must be read before the next call: until then it is not idle.

        Raises:
            ConfigError: it failed before it ever answered: vLLM cannot run this target.
            TransientError: the process died, or failed.

        """
        self._send(prompts)
        self.is_idle = not prompts
        waiting: dict[int, dict[str, Any]] = {}
        for place in range(len(prompts)):
            while place not in waiting:
                answer = self._receive()
                waiting[answer["place"]] = answer
            answer = waiting.pop(place)
            self._has_answered = True
            states = self._read(Path(answer["file"]), len(prompts[place]))
            self.is_idle = place + 1 == len(prompts)
            yield EngineStates(states=states, token=answer["token"], logprob=answer["logprob"])

    def close(self) -> None:
        """End the process, and remove its files."""
        self._finalizer()

    def _read(self, path: Path, num_tokens: int) -> Tensor:
        states = torch.frombuffer(bytearray(path.read_bytes()), dtype=self._dtype)
        path.unlink()
        return states.reshape(num_tokens, len(self.outputs), -1)

    def _send(self, line: object) -> None:
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 (PIPE was asked for)
        with suppress(BrokenPipeError):  # it is dead: no answer will come
            stdin.write(json.dumps(line) + "\n")
            stdin.flush()

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
        if not answer or "failure" in answer:
            self._fail(answer.get("failure", ""))
        return answer

    def _fail(self, failure: str) -> NoReturn:
        """Raise an error for a process that has ended, or reported why it will."""
        if failure:
            os.killpg(self._process.pid, signal.SIGKILL)  # its end may take long
        status = self._process.wait()
        printed = _tail(self._log)
        self.close()
        reason = failure or (f"killed by signal {-status}" if status < 0 else f"status {status}")
        what = f"target {self._name}: the process of vLLM ended ({reason})"
        if _NOT_WRITTEN in failure:
            raise DiskError(f"{what}; make room where temporary files go (TMPDIR)")
        if _MEMORY in failure:
            raise ConfigError(
                f"{what}; lower target.gpu_memory_utilization or target.max_num_batched_tokens"
                f"{printed}"
            )
        was_killed = not failure and status in _KILLS
        if self._has_answered or was_killed or _NO_MEMORY in failure:
            raise TransientError(f"{what}; no committed shard is lost{printed}")
        raise ConfigError(
            f"target {self._name}: vLLM does not run it: {reason}; correct the cause, or set "
            f"target.backend to transformers{printed}"
        )


def _engine_settings(config: TargetConfig, weights: Path, device: torch.device) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`."""
    return {
        "model": str(weights),
        "dtype": with_dtype(config).dtype,
        "quantization": config.quantization,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": -1,  # as long as memory allows
        "trust_remote_code": config.trust_remote_code,
        "enable_prefix_caching": False,  # a cached prefix has no states
        "enforce_eager": device.type == "cpu",
        "skip_tokenizer_init": True,
        **(
            {"gpu_memory_utilization": config.gpu_memory_utilization}
            if device.type == "cuda"
            else {}
        ),
    }


def _tail(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    return "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])


def _end(process: "subprocess.Popen[str]", answers: IO[str], log: IO[str], folder: Path) -> None:
    with suppress(ProcessLookupError):  # of its session: with tensor parallelism, several
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(BrokenPipeError), process:
        pass
    answers.close()
    log.close()
    shutil.rmtree(folder, ignore_errors=True)
