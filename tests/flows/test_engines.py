"""Flows with real engines: what they make of a draft is what Eyas makes of it.

make test-engine
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import psutil
import pytest
import torch

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.bench import BenchConfig
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import DraftSetting
from eagle_core.evaluation.measure_engine import measure_engine
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.serving.llamacpp.draft_file import FILE_NAME
from eagle_core.serving.llamacpp.installed import converter
from eagle_core.serving.llamacpp.server import LlamaCppEngine
from eagle_core.serving.round_counts import RoundCounts
from eagle_core.serving.served import EngineName, Served
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import aux_layers, for_decoding
from eagle_core.training.config import TrainingConfig
from flows.bench import bench_flow
from flows.config.export import RunExportConfig
from flows.config.store import StoreConfig
from flows.evaluate import _prompts, evaluate_flow
from flows.export import export_flow
from flows.offline import offline
from flows.regenerate import regenerate_flow
from flows.reports.engine_tables import engine_rows
from flows.tasks.trained_run import open_run
from flows.workspace import Workspace
from tests.eagle_core.evaluation.benchmarks.files import write_sets
from tests.paths import ROOT
from tests.served_target import write_served_target
from tests.tiny import write_conversations
from tests.waiting import LIMIT_SECONDS

PYTHON = os.environ.get("EYAS_VLLM_PYTHON")
EVALUATION = EvaluationConfig(max_new_tokens=24, draft_tokens=4, num_prompts=6)

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM; see CONTRIBUTING.md: make test-engine"),
]


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run whose draft has learnt what its target says."""

    target: TargetConfig
    dataset: DatasetConfig
    home: str
    acceptance: AcceptanceReport
    """As Eyas counts it."""

    @property
    def path(self) -> Path:
        """Its folder."""
        space = Workspace.at(self.home, target=self.target.name, dataset=self.dataset.name)
        return space.run_path("main")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> TrainedRun:
    """A draft of the target's own answers."""
    assert prefect_server
    folder = tmp_path_factory.mktemp("engines")
    target = TargetConfig(
        name="tiny",
        model=str(write_served_target(folder / "target")),
        dtype="float32",
        device="cpu",
        vllm_python=str(PYTHON),
    )
    home = str(folder / "home")
    asked = DatasetConfig(
        name="facts",
        source=str(write_conversations(folder / "facts.json", 40)),
        held_out_fraction=0.2,
        max_length=256,
    )
    answered = regenerate_flow(
        target=target,
        dataset=asked,
        regeneration=RegenerationConfig(max_tokens=24, cut_answers="keep"),
        home=home,
    )
    dataset = asked.model_copy(update={"name": answered.name, "source": REGENERATED})
    summary = offline(
        target=target,
        dataset=dataset,
        store=StoreConfig(shard_tokens=600),
        training=TrainingConfig(
            dtype="float32", draft_vocab_size=2000, max_steps=100, batch_tokens=512, ttt_length=4
        ),
        evaluation=EVALUATION,
        home=home,
    )
    assert summary.acceptance is not None
    return TrainedRun(
        target=target, dataset=dataset, home=home, acceptance=summary.acceptance.trained
    )


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_an_engine_counts_what_eyas_counts(trained: TrainedRun, engine: EngineName) -> None:
    summary = evaluate_flow(
        target=trained.target,
        dataset=trained.dataset,
        evaluation=EVALUATION.model_copy(
            update={"engine": engine, "concurrency": (3,), "draft_lengths": (2,)}
        ),
        home=trained.home,
    )
    ours, theirs, found = trained.acceptance, summary.trained, summary.engine
    assert sum(ours.acceptance_to_depth) > 0.2
    assert theirs.num_tokens == ours.num_tokens
    assert theirs.num_rounds == ours.num_rounds
    assert theirs.acceptance_length == ours.acceptance_length
    assert theirs.acceptance_by_depth == ours.acceptance_by_depth
    assert theirs.matches_plain
    assert summary.untrained is None
    assert found is not None
    assert [(one.setting.draft_tokens, one.concurrency) for one in found.speeds] == [
        *((2, 1), (2, 3)),
        *((4, 1), (4, 3)),
    ]
    assert all(one.num_matching == EVALUATION.num_prompts for one in found.speeds)
    shorter = found.acceptance(DraftSetting(draft_tokens=2))
    assert 1 < shorter.acceptance_length <= ours.acceptance_length
    assert found.acceptance(DraftSetting(draft_tokens=4)) == theirs


@contextmanager
def served(trained: TrainedRun, engine: EngineName, *options: str) -> Iterator[str]:
    """Serve the run as a user does; yield the URL. Afterwards no process is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "deployments", "serve", str(trained.path)),
            *("--engine", engine, "--port", port, "--slots", "1", *options),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert child.stdout is not None
    family: list[psutil.Process] = []
    try:
        line = child.stdout.readline()  # empty if it ended
        assert line.startswith(f"serving tiny at http://127.0.0.1:{port}/v1")
        family = psutil.Process(child.pid).children(recursive=True)
        assert family
        yield f"http://127.0.0.1:{port}"
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=LIMIT_SECONDS)
        assert child.returncode == 130
        _, living = psutil.wait_procs(family, timeout=LIMIT_SECONDS)
        assert not living
    finally:
        child.kill()
        child.communicate()


def chat(url: str) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me fact 3.0 about bread, please."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=LIMIT_SECONDS)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_a_served_draft_writes_what_the_target_writes_alone(
    trained: TrainedRun, engine: EngineName
) -> None:
    with served(trained, engine, "--draft-tokens", "3") as url:
        drafted = chat(url)
        if engine == "vllm":
            with httpx.Client(base_url=url) as client:
                num_accepted = RoundCounts.read(client, draft_tokens=3).num_accepted
        else:
            num_accepted = drafted["timings"]["draft_n_accepted"]
    with served(trained, engine, "--draft-tokens", "0") as url:
        plain = chat(url)
    assert num_accepted > 0
    assert drafted["choices"][0]["message"]["content"]
    assert drafted["choices"][0]["message"] == plain["choices"][0]["message"]


def test_bench_says_how_to_serve_with_llamacpp(trained: TrainedRun) -> None:
    summary = bench_flow(
        target=trained.target,
        dataset=trained.dataset,
        evaluation=EVALUATION.model_copy(update={"num_prompts": 3}),
        bench=BenchConfig(
            engine="llamacpp", draft_lengths=(1, 2), concurrency=(3,), draft_p_min=(0.0, 0.9)
        ),
        home=trained.home,
    )
    found = summary.engine
    assert found is not None
    assert [(one.setting.draft_tokens, one.setting.p_min) for one in found.acceptances] == [
        *((1, 0.0), (1, 0.9)),
        *((2, 0.0), (2, 0.9)),
    ]
    assert [one.concurrency for one in found.speeds] == [1, 3] * 4
    assert all(one.num_matching == 3 for one in found.speeds)
    everything, sure = (
        found.acceptance(DraftSetting(draft_tokens=2, p_min=p_min)) for p_min in (0.0, 0.9)
    )
    assert sure.acceptance_length < everything.acceptance_length  # it drafts less
    assert sure.num_rounds > everything.num_rounds
    assert sure.num_tokens == everything.num_tokens
    rows = dict(engine_rows(found))
    for together in ("1 prompt at a time", "3 prompts at a time"):
        assert rows[f"serve with, {together}"]
        assert f"(has {everything.acceptance_length:.2f})" in rows[f"pays from, {together}"]
    assert "tokens per second, 2 drafted, p_min 0.9" in rows
    page = (trained.path / "report.html").read_text()
    assert "Speed by draft length, relative to plain decoding in the same run" in page


def test_the_exported_file_is_the_draft_and_llamacpp_drafts_with_it(trained: TrainedRun) -> None:
    summary = export_flow(
        target=trained.target,
        dataset=trained.dataset,
        export=RunExportConfig(layouts=("gguf",), dtype="float32"),
        home=trained.home,
    )
    (exported,) = summary.layouts
    file = exported.path / FILE_NAME
    run = open_run(trained.target, trained.dataset, TrainingConfig(), trained.home, "main", "best")
    setup, _ = run.load_draft()
    found = read_gguf(file, "fc.weight", "output.weight", "d2t")
    tensors = setup.draft.published_tensors()
    tokens = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    assert found["target_layers"] == [layer + 1 for layer in aux_layers(trained.target, 8)]
    assert np.array_equal(found["fc.weight"], tensors["fc.weight"].numpy())
    assert np.array_equal(found["output.weight"], tensors["lm_head.weight"].numpy())
    assert np.array_equal(found["d2t"], tokens.numpy())
    served = Served(
        target=for_decoding(trained.target),
        weights=weights.locate(trained.target),
        draft=file,
        draft_tokens=EVALUATION.draft_tokens,
        max_length=512,
    )
    measured = measure_engine(
        LlamaCppEngine(trained.target),
        served,
        _prompts(run, EVALUATION),
        EVALUATION.model_copy(update={"concurrency": (1,)}),
        stop_ids=run.stop_ids,
    )
    report = measured.report.acceptance(DraftSetting(draft_tokens=EVALUATION.draft_tokens))
    assert report.num_rounds == trained.acceptance.num_rounds
    assert report.acceptance_by_depth == trained.acceptance.acceptance_by_depth


def read_gguf(file: Path, *names: str) -> dict[str, Any]:
    """Read tensors, and the layers that the draft reads, with llama.cpp's own reader."""
    with mock.patch.object(sys, "path", [str(converter().parent / "gguf-py"), *sys.path]):
        reader = importlib.import_module("gguf").GGUFReader(file)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    layers = reader.fields["eagle3.target_layers"].contents()
    return {"target_layers": list(layers)} | {name: tensors[name] for name in names}


def test_an_engine_counts_what_eyas_counts_on_every_set_and_turn(
    trained: TrainedRun, tmp_path: Path
) -> None:
    paths = write_sets(tmp_path)
    own = EVALUATION.model_copy(
        update={
            "benchmarks": tuple(
                BenchmarkConfig(name=name, path=str(paths[name])) for name in ("mt-bench", "gsm8k")
            ),
            "num_prompts": 2,
            "concurrency": (1,),
        }
    )
    summaries = [
        evaluate_flow(
            target=trained.target, dataset=trained.dataset, evaluation=evaluation, home=trained.home
        ).benchmarks
        for evaluation in (own, own.model_copy(update={"engine": "llamacpp"}))
    ]
    ours, theirs = summaries
    assert ours is not None
    assert theirs is not None
    for here, there in zip(ours.sets, theirs.sets, strict=True):
        assert list(there.by_turn) == list(here.by_turn)
        pairs = [(here.trained, there.trained)]
        pairs += [(part, there.by_turn[turn]) for turn, part in here.by_turn.items()]
        for one, other in pairs:
            assert other.num_tokens == one.num_tokens
            assert other.num_rounds == one.num_rounds
            assert other.acceptance_length == one.acceptance_length
        assert there.left_out == here.left_out
    assert list(ours.sets[0].by_turn) == [1, 2]
    assert theirs.mean.acceptance_length == ours.mean.acceptance_length
