"""Every flow that can be deployed or run: its name, its entrypoint and its recipe sections."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eagle_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowEntry:
    """One flow and the recipe sections that are its parameters."""

    name: str
    entrypoint: str
    """`path.py:function`, relative to the repository root, as Prefect wants it."""
    sections: tuple[str, ...]
    description: str
    own_parameters: tuple[str, ...] = ()
    """Those of `run` and `snapshot_id` that the flow takes."""
    is_exclusive: bool = False
    """Whether a second run of a deployment waits for the first, instead of doing the same work."""

    def load(self) -> Callable[..., Any]:
        """Import the flow. Prefect's environment must be settled before the first call."""
        path, _, function = self.entrypoint.partition(":")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        flow: Callable[..., Any] = getattr(module, function)
        return flow


_RUN = ("draft", "training", "tracking", "evaluation")
FLOWS = (
    FlowEntry(
        name="dataset",
        entrypoint="flows/dataset.py:dataset_flow",
        sections=("dataset",),
        description="Read, normalise, deduplicate and split the conversations",
    ),
    FlowEntry(
        name="watch",
        entrypoint="flows/watch.py:watch",
        sections=("dataset",),
        description="Check whether the source has changed since the data set was built",
    ),
    FlowEntry(
        name="regenerate",
        entrypoint="flows/regenerate.py:regenerate_flow",
        sections=("target", "dataset", "regeneration"),
        description="Replace the assistant turns with the target's own answers, as a new data set",
    ),
    FlowEntry(
        name="plan",
        entrypoint="flows/plan.py:plan",
        sections=("target", "dataset", "store", "training", "draft"),
        description="Estimate the cost of hidden-states: bytes per profile, time, whether it fits",
    ),
    FlowEntry(
        name="hidden-states",
        entrypoint="flows/hidden_states.py:hidden_states",
        sections=("target", "dataset", "store", "runner"),
        description="Compute the hidden states that are missing from the store",
        is_exclusive=True,
    ),
    FlowEntry(
        name="train",
        entrypoint="flows/train.py:train_flow",
        sections=("target", "dataset", "store", "draft", "training", "tracking"),
        own_parameters=("run", "snapshot_id"),
        description="Train the draft on the snapshot of its data set, or resume where it stopped",
    ),
    FlowEntry(
        name="evaluate",
        entrypoint="flows/evaluate.py:evaluate_flow",
        sections=("target", "dataset", "training", "evaluation"),
        own_parameters=("run",),
        description="Measure acceptance by real speculative decoding on held-out prompts",
    ),
    FlowEntry(
        name="bench",
        entrypoint="flows/bench.py:bench_flow",
        sections=("target", "dataset", "training", "evaluation", "bench"),
        own_parameters=("run",),
        description="Find out how to serve the draft on this machine, and when it pays",
    ),
    FlowEntry(
        name="estimate",
        entrypoint="flows/estimate.py:estimate_flow",
        sections=("target", "dataset", "store", "training", "evaluation"),
        own_parameters=("run",),
        description="Estimate acceptance from stored states on held-out data, without the target",
    ),
    FlowEntry(
        name="doctor",
        entrypoint="flows/doctor.py:doctor_flow",
        sections=("target", "dataset", "store", "evaluation"),
        own_parameters=("run",),
        description="Find out why acceptance is low: data, template, layers, vocabulary, learning",
    ),
    FlowEntry(
        name="export",
        entrypoint="flows/export.py:export_flow",
        sections=("target", "dataset", "training", "export"),
        own_parameters=("run",),
        description="Write the draft in the layouts that SGLang, vLLM and speculators load",
    ),
    FlowEntry(
        name="offline",
        entrypoint="flows/offline.py:offline",
        sections=("target", "dataset", "store", "runner", *_RUN),
        own_parameters=("run",),
        description="hidden-states, then train, estimate and evaluate",
    ),
    FlowEntry(
        name="online",
        entrypoint="flows/online.py:online",
        sections=("target", "dataset", "store", *_RUN),
        own_parameters=("run",),
        description="Train while the target computes the states, without a store; then evaluate",
    ),
    FlowEntry(
        name="verify",
        entrypoint="flows/verify.py:verify_flow",
        sections=("target", "dataset", "store"),
        description="Check every byte of the store and the semantic probe of every shard",
    ),
    FlowEntry(
        name="repair",
        entrypoint="flows/repair.py:repair_flow",
        sections=("target", "dataset", "store", "runner"),
        description="Recompute exactly the damaged shards of the store",
    ),
    FlowEntry(
        name="gc",
        entrypoint="flows/gc.py:gc_flow",
        sections=("target", "dataset", "store"),
        description="List what no snapshot of the store needs; delete it on request",
    ),
)

IMPORT_STORE = FlowEntry(
    name="import-store",
    entrypoint="flows/import_store.py:import_store",
    sections=("target", "dataset", "store"),
    description="Import hidden states that another tool dumped",
    own_parameters=("format", "path", "mask", "last_state", "num_checked", "check_every_row"),
)
"""Not deployed: it is typed once, where the files are."""

SERVE = FlowEntry(
    name="serve",
    entrypoint="flows/tasks/serve.py:plan_serving",
    sections=("target", "dataset", "training", "evaluation"),
    own_parameters=("run",),
    description="Serve the target with its draft",
)
"""No flow: it runs as long as it serves."""


def find_flow(name: str) -> FlowEntry:
    """Return the flow with this name; ConfigError lists those that exist."""
    for entry in FLOWS:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in FLOWS)
    raise ConfigError(f"there is no flow {name!r}; known flows: {known}")
