"""The cost of the Prefect server: `python -m benchmarks.orchestration`.

The real flow generates thousands of shards of one short sample each and reports to its own real
server; a dry-run target (random states, no model) replaces the child process. Then the same shards
are generated without Prefect: the difference is the cost of orchestration. Also measured: the
server's processor time and peak memory (Linux), its database, and the task runs that it recorded.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.machine import describe
from eagle_core.target.config import TargetConfig
from storage.store import Store

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
FLUSH_SECONDS = 120.0
REPORT = """\
# Orchestration

`python -m benchmarks.orchestration`: {machine}{note}.

{shards:,} shards of one sample in {tasks} task runs of {each}; random states, no model. SQLite;
server and flow on one machine. If other work runs on it, compare processor time.

| | with Prefect | without | difference per shard | per task run |
| --- | --- | --- | --- | --- |
| seconds | {flow.seconds:.1f} | {bare.seconds:.1f} | {wall:.1f} ms | {wall_task:.0f} ms |
| processor, flow | {flow_cpu:.1f} | {bare_cpu:.1f} | {cpu:.1f} ms | {cpu_task:.0f} ms |
| processor, server | {server:.1f} | - | {server_shard:.1f} ms | {server_task:.0f} ms |

| | |
| --- | --- |
| task runs recorded by the server | {recorded} of {tasks} |
| server, peak memory | {memory:.0f} MB; {memory_before:.0f} MB before the run |
| database | {database:.1f} MB; {database_before:.1f} MB before the run |
| listing the task runs through the API | {listing:.2f} s |
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """The time to generate all shards."""

    seconds: float
    processor_seconds: float
    """Of the flow's process only, not of the server's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running Prefect server."""

    api_url: str
    process_id: int
    home: Path

    def post(self, path: str, body: object) -> list[dict[str, object]]:
        """Call the REST API."""
        request = Request(  # noqa: S310 (loopback http)
            f"{self.api_url}/{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urlopen(request, timeout=60) as answer:  # noqa: S310
            found: list[dict[str, object]] = json.loads(answer.read())
        return found

    def peak_bytes(self) -> int:
        """Return its peak resident memory so far."""
        lines = Path(f"/proc/{self.process_id}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def processor_seconds(self) -> float:
        """Return its processor time so far."""
        fields = Path(f"/proc/{self.process_id}/stat").read_text(encoding="ascii").split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    def database_bytes(self) -> int:
        """Return the size of the database, its write-ahead log included."""
        return sum(path.stat().st_size for path in self.home.glob("prefect.db*"))


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Serve the API on loopback from a new database, without the UI's files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api_url = f"http://127.0.0.1:{port}/api"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
            *("--host", "127.0.0.1", "--port", str(port), "--log-level", "error"),
        ],
        env={
            **os.environ,
            "PREFECT_HOME": str(folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        },
    )
    try:
        while not _is_healthy(api_url):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}")
            time.sleep(0.5)
        yield Server(api_url=api_url, process_id=process.pid, home=folder)
    finally:
        process.terminate()
        process.wait()


def _is_healthy(api_url: str) -> bool:
    try:
        with urlopen(f"{api_url}/health", timeout=2) as answer:  # noqa: S310 (loopback http)
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def write_target(folder: Path) -> TargetConfig:
    """Write a random Llama of 5 layers and 8 channels, with a tokenizer of single bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="</s>",  # noqa: S106
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=5,
        num_attention_heads=1,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return TargetConfig(
        name="dry-run",
        model=str(folder),
        dtype="float32",
        device="cpu",
        aux_layers=(1, 2, 3),  # the default needs more layers
    )


def write_recipe(folder: Path, target: TargetConfig, *, num_shards: int, each: int) -> Path:
    """Write one short conversation per shard, and the recipe for them."""
    lines = [
        json.dumps(
            {
                "conversations": [
                    {"from": "human", "value": f"{number}?"},
                    {"from": "gpt", "value": "Yes."},
                ]
            }
        )
        for number in range(num_shards)
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = {
        "target": target.model_dump(mode="json"),
        "dataset": {"name": "chats", "source": str(folder / "chats.jsonl"), "held_out_fraction": 0},
        "store": {"root": str(folder / "store"), "shard_tokens": 1, "shards_per_task": each},
    }
    path = folder / "dry-run.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(recipe: Path, folder: Path, environment: Mapping[str, str], *options: str) -> Took:
    """Run `benchmarks.dry_run` in a separate process; return its time."""
    lines = subprocess.check_output(
        [
            *(sys.executable, "-m", "benchmarks.dry_run", str(recipe)),
            *("--home", str(folder / "home"), *options),
        ],
        env={**os.environ, **environment},
        text=True,
    )
    seconds, processor_seconds = json.loads(lines.splitlines()[-1])
    return Took(seconds=seconds, processor_seconds=processor_seconds)


def task_runs(server: Server, *, expected: int) -> tuple[int, float]:
    """Wait until the server has recorded them; return their number and a listing's seconds."""
    deadline = time.monotonic() + FLUSH_SECONDS
    while True:
        started = time.monotonic()
        found: list[dict[str, object]] = []
        while page := server.post(
            "task_runs/filter",
            {"offset": len(found), "task_runs": {"name": {"like_": "shards "}}},
        ):
            found += page
        seconds = time.monotonic() - started
        done = [run for run in found if run["state_name"] == "Completed"]
        if len(done) >= expected or time.monotonic() > deadline:
            return len(done), seconds
        time.sleep(2)


def main() -> None:
    """Print the results and write them to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--shards-per-task", type=int, default=100)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--note", default="", help="Other work on the machine during the run.")
    arguments = parser.parse_args()
    each = arguments.shards_per_task
    num_tasks = -(-arguments.shards // each)
    with tempfile.TemporaryDirectory(prefix="eyas-orchestration-") as name:
        folder = Path(name)
        target = write_target(folder / "target")
        recipe = write_recipe(folder, target, num_shards=arguments.shards, each=each)
        with running_server(folder / "server") as server:
            memory_before, database_before = server.peak_bytes(), server.database_bytes()
            server_before = server.processor_seconds()
            client = {"PREFECT_API_URL": server.api_url, "PREFECT_HOME": str(folder / "client")}
            flow = run(recipe, folder, client)
            recorded, listing = task_runs(server, expected=num_tasks)
            server_seconds = server.processor_seconds() - server_before
            memory, database = server.peak_bytes(), server.database_bytes()
        assert len(Store.open(str(folder / "store")).shard_ids()) == arguments.shards
        bare = run(recipe, folder, {}, "--bare", str(folder / "bare"))
        assert len(Store.open(str(folder / "bare")).shard_ids()) == arguments.shards
    wall = flow.seconds - bare.seconds
    processor = flow.processor_seconds - bare.processor_seconds
    report = REPORT.format(
        machine=describe(("prefect", "sqlalchemy")),
        note=f"; {arguments.note}" if arguments.note else "",
        shards=arguments.shards,
        tasks=num_tasks,
        each=each,
        flow=flow,
        bare=bare,
        flow_cpu=flow.processor_seconds,
        bare_cpu=bare.processor_seconds,
        wall=wall / arguments.shards * 1000,
        wall_task=wall / num_tasks * 1000,
        cpu=processor / arguments.shards * 1000,
        cpu_task=processor / num_tasks * 1000,
        server=server_seconds,
        server_shard=server_seconds / arguments.shards * 1000,
        server_task=server_seconds / num_tasks * 1000,
        memory=memory / 1e6,
        memory_before=memory_before / 1e6,
        database=database / 1e6,
        database_before=database_before / 1e6,
        recorded=recorded,
        listing=listing,
    )
    Console().print(report, markup=False, highlight=False, soft_wrap=True)
    if arguments.results:
        arguments.results.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
