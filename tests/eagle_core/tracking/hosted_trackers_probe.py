"""Track with the real packages and read back what they wrote; run in an environment that has them.

`python hosted_trackers_probe.py ACTION TRACKER[,...] FOLDER`; the answer is one JSON document in
FOLDER/answer.json. No action may open a connection to another machine.
"""

import json
import logging
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle_core.tracking.config import TrackedRun, TrackingConfig
from eagle_core.tracking.hosted import hosted_run_id
from eagle_core.tracking.trackers import open_trackers

NAME = "smollm2-facts.v2-main"
FIRST, SECOND = (1, 2, 3), (4, 5)
connections: list[str] = []
warnings: list[str] = []


class Warnings(logging.Handler):
    """Keeps what our own code warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        warnings.append(record.getMessage())


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Remember every connection that is no Unix socket."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        connections.append(str(arguments[1][0]))


def run_of(folder: Path) -> TrackedRun:
    settings = {"training": {"learning_rate": 0.001, "max_steps": None}, "source_id": "abc"}
    return TrackedRun(name=NAME, path=folder / "runs" / NAME, settings=settings)


def track(config: TrackingConfig, folder: Path, steps: tuple[int, ...]) -> None:
    with open_trackers(config, run_of(folder)) as tracker:
        for step in steps:
            tracker.log({"loss": 1 / step, "held_out/prefix_0": step * 0.1}, step=step)
            tracker.log({"tokens_per_second": 100.0 * step}, step=step)  # a second call of a step


def track_until_it_breaks(config: TrackingConfig, folder: Path) -> None:
    """Lose what the package depends on in the middle; the last step must still be reached."""
    with open_trackers(config, run_of(folder)) as tracker:
        tracker.log({"loss": 1.0}, step=1)
        if config.trackers == ("wandb",):
            os.kill(wandb_helper(), signal.SIGKILL)
        else:
            with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
                database.execute("drop table metrics")
        for step in range(2, 1000):
            tracker.log({"loss": 1.0 / step}, step=step)


def wandb_helper() -> int:
    """Return the process id of the helper that this process started."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().decode().split("\0")
        if "wandb-core" in words[0] and str(os.getpid()) in words:
            return int(path.parent.name)
    raise LookupError


def read(trackers: tuple[str, ...], folder: Path) -> dict[str, list[Any]]:
    """Return [hosted run, project, {step: {name: value}}, settings seen] of every file or run."""
    readers = {"wandb": read_wandb, "swanlab": read_swanlab, "mlflow": read_mlflow}
    return {tracker: list(readers[tracker](folder)) for tracker in trackers}


def read_wandb(folder: Path) -> Iterator[Any]:
    """Parse with W&B's own messages; the framing is read by SwanLab, which imports such files."""
    from swanlab.converter.wb.wbdatastore import WBDataStoreReader
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((folder / "runs" / NAME / "wandb").glob("offline-run-*/*.wandb")):
        found: dict[int, dict[str, float]] = {}
        names = settings = None
        reader = WBDataStoreReader()
        reader.open(path)
        while (data := reader.scan()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                step = int(items["_step"])
                values = {name: v for name, v in items.items() if not name.startswith("_")}
                found.setdefault(step, {}).update(values)
            elif record.HasField("run"):
                names = [record.run.run_id, record.run.project]
                settings = {item.key: item.value_json for item in record.run.config.update}
        yield [*(names or ()), found, settings]


def read_swanlab(folder: Path) -> Iterator[Any]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    for path in sorted((folder / "runs" / NAME / "swanlab").glob("*/*.swanlab")):
        found: dict[int, dict[str, float]] = {}
        names: list[str] = []
        reader = DataStoreReader()
        reader.open(path)
        for data in reader:
            record = Record()
            record.ParseFromString(data)
            if record.HasField("start"):
                names = [record.start.id, record.start.project]
            elif record.HasField("scalar"):
                scalar = record.scalar
                found.setdefault(scalar.step, {})[scalar.key] = scalar.value.number
        settings = (path.parent / "files" / "config.yaml").read_text()
        yield [*names, found, settings]


def read_mlflow(folder: Path) -> Iterator[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            found: dict[int, dict[str, float]] = {}
            for name in run.data.metrics:
                for metric in client.get_metric_history(run.info.run_id, name):
                    found.setdefault(metric.step, {})[name] = metric.value
            hosted = run.data.tags["eyas.run"]
            yield [hosted, experiment.name, found, {**run.data.params, "status": run.info.status}]


def main() -> None:
    """Do one action and write the answer."""
    action, trackers, folder = sys.argv[1], tuple(sys.argv[2].split(",")), Path(sys.argv[3])
    logging.getLogger("eagle_core").addHandler(Warnings())
    sys.addaudithook(watch)
    config = TrackingConfig(trackers=trackers, project="drafts")  # type: ignore[arg-type]
    answer: Any = None
    if action == "break":
        track_until_it_breaks(config, folder)
    elif action == "read":
        answer = read(trackers, folder)
    else:
        track(config, folder, {"first": FIRST, "second": SECOND}[action])
    document = {"id": hosted_run_id(NAME), "answer": answer, "warnings": warnings}
    (folder / "answer.json").write_text(json.dumps({**document, "connections": connections}))


if __name__ == "__main__":
    main()
