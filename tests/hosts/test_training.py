"""Two machines on a network train one draft; one is lost in the middle, and another comes for it.

No variable says which one is the first: the address in the rendezvous does.
"""

import os
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.hosts.network import FIRST_ADDRESS, Host, network
from tests.hosts.servers import prefect_on_sqlite
from tests.machines import (
    Machine,
    none_left,
    run_path,
    start,
    wait_for_steps,
    weights,
    write_recipe,
)

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(
        "EYAS_OWN_NETWORK" not in os.environ,
        reason="needs a network of its own: make test-hosts",
    ),
]
TOGETHER = ("training.nodes=2", f"training.rendezvous={FIRST_ADDRESS}:29500")
IMPATIENT = "training.node_timeout_seconds=60"
"""A host that is gone without a word is waited for so long, and one that begins later, too."""


def test_a_machine_that_is_lost_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    target = tiny.write_target(tmp_path / "target")
    conversations = tiny.write_conversations(tmp_path / "facts.json", 40)
    recipe = write_recipe(tmp_path / "recipe.yaml", target, conversations)
    two = run_path(recipe, "two")

    with (
        network() as joined,
        prefect_on_sqlite(tmp_path) as prefect,
        joined.host("second") as second,
        joined.host("third") as third,
        none_left(),
    ):
        # To start a server of their own takes them longer than to train.
        reporting = {"PREFECT_API_URL": prefect.api_url}

        def train(host: Host | None, *more: str) -> Machine:
            name, prefix = ("first", ()) if host is None else (host.name, host.prefix)
            settings = (*TOGETHER, *more)
            log = tmp_path / f"{name}.log"
            return start(
                "train", recipe, log, *settings, run="two", environment=reporting, prefix=prefix
            )

        states = start("hidden-states", recipe, tmp_path / "states.log", environment=reporting)
        states.ended_well()
        first, other = train(None, IMPATIENT), train(second, IMPATIENT)
        wait_for_steps(two, [first, other])
        second.lose()
        other.process.wait()
        said = first.failed()
        assert "the last checkpoint is good: run the same command again on all machines" in said

        first, other = train(None), train(third)
        first.ended_well()
        assert "and not the first: it wrote nothing" in other.ended_well()

        log, processes = tmp_path / "one.log", "training.num_processes=2"
        start("train", recipe, log, processes, run="one", environment=reporting).ended_well()
    found = weights(two)
    for name, tensor in weights(run_path(recipe, "one")).items():
        assert torch.equal(found[name], tensor), name
