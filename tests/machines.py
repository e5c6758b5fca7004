"""Machines that train one run together: each is a process of the command line."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.torch import load_file
from torch import Tensor

from eagle_core.training import checkpoint
from tests.paths import ROOT
from tests.waiting import wait_for

TRAINING = {
    "dtype": "float32",
    "draft_vocab_size": 300,
    "ttt_length": 2,
    "batch_tokens": 256,
    "warmup_steps": 2,
    "epochs": 15,
    "checkpoint_every": 1,
    "held_out_every": 1000,
}


def write_recipe(path: Path, target: Path, conversations: Path, **training: object) -> Path:
    """Write a recipe of the tiny target."""
    recipe = {
        "target": {
            "name": "tiny",
            "model": str(target),
            "dtype": "float32",
            "device": "cpu",
            "batch_tokens": 512,
        },
        "dataset": {
            "name": "facts",
            "source": str(conversations),
            "held_out_fraction": 0.2,
            "max_length": 256,
        },
        "store": {"shard_tokens": 600},
        "training": {**TRAINING, **training},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


_started: list["Machine"] = []


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One command on one machine."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def ended_well(self) -> str:
        """Wait until it has ended and return what it printed."""
        assert self.process.wait() == 0, self.log.read_text()[-6000:]
        return self.log.read_text()

    def failed(self) -> str:
        """Wait until it has failed and return what it printed, in one line."""
        assert self.process.wait() != 0, self.log.read_text()[-6000:]
        return " ".join(self.log.read_text().split())

    def stop(self) -> None:
        """Ask it to stop, as Slurm and Kubernetes do."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all of its processes, as a loss of power does."""
        every = [*psutil.Process(self.process.pid).children(recursive=True)]
        for one in [psutil.Process(self.process.pid), *every]:
            one.kill()
        psutil.wait_procs(every)
        self.process.wait()


def start(
    flow: str,
    recipe: Path,
    log: Path,
    *overrides: str,
    run: str | None = None,
    environment: Mapping[str, str] = {},
    prefix: Sequence[str] = (),
) -> Machine:
    """Run a flow with `home` beside the recipe; what stands before the command decides where."""
    sets: list[Any] = [part for one in overrides for part in ("--set", one)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", "deployments", "run", flow, recipe),
                *("--home", recipe.parent / "home", *sets, *(["--run", run] if run else [])),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PREFECT_HOME": str(log.with_suffix(".prefect")),
                **environment,
            },
            stdout=output,
            stderr=output,
        )
    _started.append(Machine(process=process, log=log))
    return _started[-1]


@contextmanager
def none_left() -> Iterator[None]:
    """Kill what still runs when the block ends, as after a test that failed."""
    try:
        yield
    finally:
        while _started:
            if (one := _started.pop()).process.poll() is None:
                one.kill()


def run_path(recipe: Path, run: str) -> Path:
    """Return the folder of a run."""
    return recipe.parent / "home" / "runs" / f"tiny-facts-{run}"


def newest_step(path: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 without one."""
    names = [folder.name for folder in path.glob("checkpoints/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def wait_for_steps(path: Path, machines: Sequence[Machine], *, number: int = 2) -> None:
    """Wait until a run has done some more steps."""
    before = newest_step(path)

    def are_done() -> bool:
        for one in machines:
            assert one.process.poll() is None, one.log.read_text()[-6000:]
        return newest_step(path) >= before + number

    wait_for(are_done, what=f"{number} steps")


def weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a run's newest checkpoint."""
    folder = checkpoint.newest(path)
    assert folder is not None
    tensors: dict[str, Tensor] = load_file(folder / checkpoint.WEIGHTS_NAME)
    return tensors
