"""Workers on other hosts, a link that is cut, a server that restarts, a host that is gone.

Prefect's server with PostgreSQL, the scheduler and the flow are on one host, the store is on
another, and workers with a target each are on two more.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import yaml
from transformers import AutoConfig, LlamaForCausalLM

from storage.errors import ConfigError
from storage.maintenance.verify import verify_store
from storage.records.commit_record import CommitRecord
from storage.store import Store
from tests import needs, tiny
from tests.hosts.network import FIRST_ADDRESS, Host, Network, network
from tests.hosts.servers import Prefect, prefect_on_postgres, process
from tests.storage.seaweed import BUCKET, seaweed
from tests.storage.synthetic import nameless_commits
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(
        "EYAS_OWN_NETWORK" not in os.environ,
        reason="needs a network of its own: make test-hosts",
    ),
    needs.POSTGRES.mark(),
    needs.SEAWEED.mark(),
]
NUM_CONVERSATIONS = 400
SHARDS_PER_TASK = 4
RAY_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}
"""No secret of the head, which the other hosts would need; each line of the workers is shown."""
RAY_SIZE = ("--object-store-memory", "200000000", "--disable-usage-stats")
COMMANDS = {
    "dask": (
        f"tcp://{FIRST_ADDRESS}:8786",
        ("scheduler", "--host", "{address}", "--port", "8786", "--no-dashboard"),
        (
            *("worker", f"tcp://{FIRST_ADDRESS}:8786", "--host", "{address}"),
            *("--nthreads", "1", "--no-dashboard"),
        ),
    ),
    "ray": (
        f"{FIRST_ADDRESS}:6379",
        (
            *("start", "--head", "--block", "--port", "6379", "--node-ip-address", "{address}"),
            *("--num-cpus", "0", "--include-dashboard", "false", *RAY_SIZE),
        ),
        (
            *("start", "--block", "--address", f"{FIRST_ADDRESS}:6379"),
            *("--node-ip-address", "{address}", "--num-cpus", "1", *RAY_SIZE),
        ),
    ),
}
"""Per kind: address, command of the head, command of a worker."""
SAVE_BLOCK = """
import json, sys
from prefect.blocks.system import Secret
Secret(value=json.load(sys.stdin)).save("lake")
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all runs here share."""

    prefect: Prefect
    network: Network
    folder: Path

    @contextmanager
    def running(self, name: str, **sections: object) -> Iterator["subprocess.Popen[bytes]"]:
        """Run `hidden-states` with some sections of the recipe."""
        recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text())
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**recipe, **sections}))
        command = ["deployments", "run", "hidden-states", path, "--home", self.folder / "home"]
        log = self.folder / f"{name}.log"
        environment = {**self.prefect.environment, **RAY_ENVIRONMENT}
        run = process([sys.executable, "-m", *command], environment, log)
        with run as running:
            yield running
            assert running.wait() == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Start the servers, and make one store undisturbed."""
    folder = tmp_path_factory.mktemp("site")
    conversations = tiny.write_conversations(folder / "facts.json", NUM_CONVERSATIONS)
    target = write_target(folder / "target")
    recipe = {
        "target": {"name": "small", "model": str(target), "dtype": "float32", "device": "cpu"},
        "dataset": {"name": "facts", "source": str(conversations), "max_length": 256},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with network() as joined, joined.host("store") as store, ExitStack() as serving:
        (folder / "weed").mkdir()
        s3 = serving.enter_context(seaweed(folder / "weed", store.address, store.prefix))
        serving.enter_context(mock.patch.dict(os.environ, s3.variables))
        prefect = serving.enter_context(prefect_on_postgres(folder))
        subprocess.run(
            [sys.executable, "-c", SAVE_BLOCK],
            input=json.dumps(s3.variables),
            env=dict(prefect.environment),
            text=True,
            check=True,
        )
        yield Site(prefect=prefect, network=joined, folder=folder)


@pytest.fixture(scope="module")
def alone(site: Site) -> Store:
    """Return the store that the first host makes by itself, undisturbed."""
    root = str(site.folder / "alone")
    with site.running("alone", store=store_section(root)):
        pass
    return Store.open(root)


def store_section(root: str, **settings: str) -> dict[str, object]:
    """Return the recipe's section of a store with some dozens of shards."""
    return {"root": root, "shard_tokens": 1000, "shards_per_task": SHARDS_PER_TASK, **settings}


def write_target(folder: Path) -> Path:
    """Write a target that takes a second or so for a shard."""
    config = AutoConfig.from_pretrained(tiny.write_target(folder))
    config.update({"hidden_size": 256, "head_dim": 64, "intermediate_size": 768})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Seen:
    """The commit records of a store, while a flow adds to them."""

    def __init__(self, root: str, flow: "subprocess.Popen[bytes]") -> None:
        self._root = root
        self._flow = flow
        self.committed: Mapping[str, CommitRecord] = {}

    def wait_for_more(self, number: int) -> None:
        """Wait until as many more shards are committed; remember the records."""
        wanted = len(self.committed) + number

        def are_there() -> bool:
            assert self._flow.poll() is None, "the flow ended before everything had happened to it"
            self.committed = self._now()
            return len(self.committed) >= wanted

        wait_for(are_there, what=f"{wanted} shards")

    def _now(self) -> Mapping[str, CommitRecord]:
        try:
            return dict(Store.open(self._root).commits().items())
        except ConfigError:  # not made yet
            return {}


def batches_in_logs(logs: Iterable[Path]) -> Counter[str]:
    """Return how often each batch was computed to its end, by the logs of the workers."""
    found: Counter[str] = Counter()
    for log in logs:
        found.update(re.findall(r"shards (\d+-\d+): \d+ committed", log.read_text()))
    return found


@contextmanager
def cluster(kind: str, site: Site, workers: Sequence[Host]) -> Iterator[Mapping[str, object]]:
    """Yield the recipe's section of a cluster with its head here and a worker on each host."""
    program = Path(sys.executable).with_name(kind)
    address, head, worker = COMMANDS[kind]
    environment = {**site.prefect.environment, **RAY_ENVIRONMENT}
    with ExitStack() as serving:

        def start(name: str, host_address: str, *command: str) -> None:
            """Start one of the cluster's programs."""
            filled = [part.format(address=host_address) for part in command]
            log = site.folder / f"{kind}-{name}.log"
            serving.enter_context(process(filled, environment, log))

        start("head", FIRST_ADDRESS, str(program), *head)
        for host in workers:
            start(host.name, host.address, *host.prefix, str(program), *worker)
        yield {"kind": kind, "address": address}


@pytest.mark.parametrize(
    ("kind", "loses_a_host"),
    # Ray waits forever for a host that is gone without a word (ray-project/ray#63405).
    [("dask", True), ("ray", False)],
)
def test_only_what_was_in_flight_is_lost(
    site: Site, alone: Store, kind: str, *, loses_a_host: bool
) -> None:
    root = f"s3://{BUCKET}/{kind}"
    sections = {"store": store_section(root, credentials="lake")}
    with (
        site.network.host(f"{kind}-1") as first,
        site.network.host(f"{kind}-2") as second,
        cluster(kind, site, [first, second]) as runner,
        site.running(kind, **sections, runner=runner) as flow,
    ):
        seen = Seen(root, flow)
        seen.wait_for_more(3)
        first.unplug()
        seen.wait_for_more(1)
        first.plug()
        seen.wait_for_more(2)
        site.prefect.restart()
        if loses_a_host:
            seen.wait_for_more(2)
            second.lose()
    stored = Store.open(root)
    assert seen.committed.items() <= stored.commits().items(), "what was committed stayed"
    assert nameless_commits(stored) == nameless_commits(alone)
    assert verify_store(stored, deep=True) == []
    batches = batches_in_logs(site.folder.glob(f"{kind}*.log"))
    assert max(batches.values()) == 1, "no batch was computed to its end twice"
    assert len(batches) > len(alone.shard_ids()) // SHARDS_PER_TASK // 2, "the logs have them"
