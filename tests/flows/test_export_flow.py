"""The export flow: from a run's checkpoints to folders that are the draft, bit for bit."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.importing import read_draft
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import Checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.decoded_points import Decoded, DecodedPoint, add_points
from eagle_core.training.loader import LoaderState
from flows.bridge.draft_setup import choose_vocabulary, set_up_draft
from flows.config.export import RunExportConfig
from flows.export import export_flow
from flows.reports.export_rows import export_rows
from flows.summaries import ExportedLayout, ExportSummary
from flows.tasks.prepare import prepare

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

TRAINING = TrainingConfig(draft_vocab_size=200)
EMBEDDING = "embed_tokens.weight"


def perturbed(draft: DraftModel, seed: int) -> dict[str, torch.Tensor]:
    """Return other weights, as if `seed` steps had changed them, as before channels were scaled."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and name != EMBEDDING
        else tensor
        for name, tensor in draft.published_tensors().items()
    }


@flow
def run_with_two_checkpoints(
    target: TargetConfig, dataset: DatasetConfig, home: Path, *, is_measured: bool = True
) -> dict[int, dict[str, torch.Tensor]]:
    """Write the checkpoints of a run that was better at step 1 than at step 2; return weights."""
    space, tokens = prepare(target, dataset, str(home))
    run_path = space.run_path("main")
    choose_vocabulary(target, TRAINING, TokenFile(tokens.train_path), run_path)
    setup = set_up_draft(target, TRAINING, run_path)
    weights = {step: perturbed(setup.draft, step) for step in (1, 2)}
    for step, state in weights.items():
        record = Checkpoint(
            step=step,
            loader=LoaderState(source_id="s", seed=0),
            identity={"draft": setup.draft.config.identity()},
            figures={"held_out_step": step if is_measured else 0, "held_out_length": 4.0 - step},
        )
        checkpoint.save(run_path, record, state, {}, keep_last=2)
    return weights


@pytest.mark.parametrize(("choice", "step"), [("best", 1), ("newest", 2)])
def test_the_chosen_checkpoint_comes_out_bit_for_bit_in_every_layout(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, choice: str, step: int
) -> None:
    weights = run_with_two_checkpoints(target, dataset, tmp_path)
    config = RunExportConfig(dtype="float32", checkpoint=choice)  # type: ignore[arg-type]
    summary = export_flow(target, dataset, TRAINING, config, home=str(tmp_path))
    assert (summary.checkpoint_step, summary.held_out_length) == (step, 4.0 - step)
    folder = tmp_path / "runs" / "tiny-facts-main" / "export"
    assert {exported.path for exported in summary.layouts} == {
        folder / "serving",
        folder / "speculators",
    }
    for exported in summary.layouts:
        imported = read_draft(exported.path)
        assert imported.aux_layers == (1, 3, 4)
        for name, tensor in imported.tensors.items():
            assert torch.equal(tensor, weights[step][name]), name
        assert len(imported.tensors) >= len(weights[step]) - 1  # serving leaves the embedding out
        sizes = [path.stat().st_size for path in exported.path.iterdir()]
        assert exported.num_bytes == sum(sizes) > 100_000
    document = json.loads((folder / "speculators" / "config.json").read_text())
    verifier = document["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == summary.served_model == str(Path(target.model).resolve())


@flow
def draft_that_starts_from(
    folder: Path, target: TargetConfig, dataset: DatasetConfig, home: Path
) -> DraftModel:
    space, tokens = prepare(target, dataset, str(home))
    training = TRAINING.model_copy(update={"start": str(folder), "draft_vocab_size": 150})
    choose_vocabulary(target, training, TokenFile(tokens.train_path), space.run_path("on"))
    return set_up_draft(target, training, space.run_path("on")).draft


def test_a_run_starts_from_an_exported_draft(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    weights = run_with_two_checkpoints(target, dataset, tmp_path)[1]
    export = RunExportConfig(dtype="float32", layouts=("serving",))
    (exported,) = export_flow(target, dataset, TRAINING, export, home=str(tmp_path)).layouts
    draft = draft_that_starts_from(exported.path, target, dataset, tmp_path)
    assert torch.equal(draft.fc.weight, weights["fc.weight"])
    assert torch.equal(draft.midlayer.mlp.up_proj.weight, weights["midlayer.mlp.up_proj.weight"])
    others = target.model_copy(update={"aux_layers": (0, 3, 4)})
    with pytest.raises(MismatchError, match=r"reads the aux layers \(1, 3, 4\).*\(0, 3, 4\)"):
        draft_that_starts_from(exported.path, others, dataset, tmp_path)


def test_without_a_measurement_the_newest_is_the_best(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    run_with_two_checkpoints(target, dataset, tmp_path, is_measured=False)
    summary = export_flow(target, dataset, TRAINING, home=str(tmp_path))
    assert (summary.checkpoint_step, summary.held_out_length) == (2, None)


def test_a_draft_that_decoding_chose_has_its_decoded_length(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    run_with_two_checkpoints(target, dataset, tmp_path, is_measured=False)
    for step, length in ((1, 1.75), (2, 1.5)):
        decoded = Decoded(acceptance_length=length, acceptance_by_depth=())
        point = DecodedPoint(step=step, draft="d", prompts="p", decoded=decoded)
        add_points(tmp_path / "runs" / "tiny-facts-main", point)
    training = TRAINING.model_copy(update={"decode_every": 1, "best_by": "decoding"})
    config = RunExportConfig(checkpoint="newest")  # the settings of the run are not recorded
    summary = export_flow(target, dataset, training, config, home=str(tmp_path))
    assert (summary.held_out_length, summary.decoded_length) == (None, 1.5)
    rows = dict(export_rows(summary))
    assert rows["acceptance length, decoded"] == "1.50 tokens per target forward"
    assert "acceptance length, held out" not in rows


def test_what_cannot_be_exported_is_named_and_leaves_nothing(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, tiny_target_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no checkpoint yet; run the train flow first"):
        export_flow(target, dataset, TRAINING, home=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    run_with_two_checkpoints(target, dataset, tmp_path)
    changed = shutil.copytree(tiny_target_path, tmp_path / "changed")
    path = changed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 4096}))
    other = target.model_copy(update={"model": str(changed)})
    with pytest.raises(MismatchError, match=r"is of a target with vocabulary \d+ \(now 4096\)"):
        export_flow(other, dataset, TRAINING, home=str(tmp_path))
    assert not list((tmp_path / "runs").glob("*/export"))


def test_the_table_has_the_commands_that_serve_the_draft(tmp_path: Path) -> None:
    names = ("serving", "speculators", "gguf")
    summary = ExportSummary(
        run_path=tmp_path,
        checkpoint_step=7,
        held_out_length=2.5,
        served_model="meta-llama/Llama-3.1-8B-Instruct",
        revision="main",
        speculative_tokens=4,
        layouts=tuple(
            ExportedLayout(layout=name, path=tmp_path / "a b" / name, num_bytes=1500)
            for name in names  # type: ignore[arg-type]
        ),
        seconds=1.0,
    )
    lacking = replace(summary.layouts[0], lacking={"sglang": ("qk_norm", "sliding_window")})
    refused = dict(export_rows(replace(summary, layouts=(lacking,))))
    assert refused["not for SGLang 0.5.23"] == "it has no qk_norm and sliding_window"
    assert "serve with SGLang" not in refused
    rows = dict(export_rows(summary))
    folder = str(tmp_path / "a b" / "serving")
    target = ["meta-llama/Llama-3.1-8B-Instruct", "--revision", "main"]
    assert rows["folder: serving"] == f"{folder} (1.5 KB)"
    assert shlex.split(rows["serve with SGLang"]) == [
        *("python", "-m", "sglang.launch_server", "--model-path", *target),
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", folder),
        *("--speculative-num-steps", "4", "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", "5"),
    ]
    *words, options = shlex.split(rows["serve with vLLM"])
    assert words == ["vllm", "serve", *target, "--speculative-config"]
    assert json.loads(options) == {
        "method": "eagle3",
        "model": folder,
        "num_speculative_tokens": 4,
    }
    speculators = str(tmp_path / "a b" / "speculators")
    assert shlex.split(rows["serve with vLLM (speculators)"]) == ["vllm", "serve", speculators]
    assert shlex.split(rows["serve with llama.cpp"]) == [
        *("llama-server", "--model", "TARGET.gguf", "--spec-type", "draft-eagle3"),
        *("--spec-draft-model", str(tmp_path / "a b" / "gguf" / "draft.gguf")),
        *("--spec-draft-n-max", "4"),
    ]


def test_what_is_evaluated_is_what_is_served() -> None:
    assert EvaluationConfig().checkpoint == RunExportConfig().checkpoint == "best"
