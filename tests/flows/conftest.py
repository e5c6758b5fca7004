"""One small pipeline: a tiny target, a small data set, and the settings that go with them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
from matplotlib.figure import Figure
from pydantic import BaseModel

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from flows.config.store import StoreConfig
from flows.reports import plots
from flows.workers.child_process import Child
from flows.workers.pool import WorkerPool
from flows.workers.shard_batch import ShardReport
from tests import tiny

NUM_CONVERSATIONS = 40


class _LivingOn(WorkerPool):
    """Is not closed by the flow that used it."""

    def close(self) -> None:
        """Leave the process to the next flow."""


def _object_store() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.fixture(scope="session", autouse=True)
def shard_process() -> Iterator[None]:
    """Make the shards of all flows in one process, as within one flow: its imports take seconds.

    Flows with several processes, or with an object store in the environment, have their own.
    """
    shared, at_first = _LivingOn([{}]), _object_store()

    def pool(
        slots: Sequence[Mapping[str, str]], *, on_report: Callable[[ShardReport], None]
    ) -> WorkerPool:
        if len(slots) == 1 and _object_store() == at_first:
            shared.on_report = on_report
            return shared
        return WorkerPool(slots, on_report=on_report)

    with mock.patch("flows.orchestration.task_runners.WorkerPool", pool):
        yield
    WorkerPool.close(shared)


@pytest.fixture(scope="session", autouse=True)
def measuring_process() -> Iterator[None]:
    """Measure what states cost, for all flows, in one process of each module."""
    children: dict[str, list[Child]] = {}

    def ask(
        module: str, request: BaseModel, *, what: str, environment: Mapping[str, str]
    ) -> Iterator[str]:
        assert not environment  # such as of one GPU among others
        started = children.setdefault(module, [])
        if not started or not started[-1].is_idle:
            started.append(Child(module, environment={}))
        yield from started[-1].request(request, what=what)

    with mock.patch("flows.tasks.preflight.run_child", ask):
        yield
    for child in chain.from_iterable(children.values()):
        child.close()


@pytest.fixture(scope="module")
def plots_drawn_once() -> Iterator[None]:
    """Draw one plot of each name, for modules that look at none: half of a short training."""
    drawn: dict[str, str] = {}
    draw = plots._svg

    def once(figure: Figure, name: str) -> str:
        if name not in drawn:
            drawn[name] = draw(figure, name)
        return drawn[name]

    with mock.patch("flows.reports.plots._svg", once):
        yield


@pytest.fixture
def target(tiny_target_path: Path) -> TargetConfig:
    """The tiny target, in float32 on the CPU."""
    return TargetConfig(
        name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu", batch_tokens=512
    )


@pytest.fixture(scope="session")
def conversations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ShareGPT file of 40 conversations."""
    path = tmp_path_factory.mktemp("conversations") / "tiny.json"
    return tiny.write_conversations(path, NUM_CONVERSATIONS)


@pytest.fixture
def dataset(conversations_path: Path) -> DatasetConfig:
    """The small data set, a fifth of it held out."""
    return DatasetConfig(
        name="facts", source=str(conversations_path), held_out_fraction=0.2, max_length=256
    )


@pytest.fixture
def store() -> StoreConfig:
    """Shards of a few samples, four to a task."""
    return StoreConfig(shard_tokens=600, shards_per_task=4)
