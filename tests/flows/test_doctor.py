"""The doctor on a sound run, and on runs that are broken as users break them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Message
from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_plain_batch
from eagle_core.diagnosis.diagnosis import diagnose
from eagle_core.diagnosis.finding import Finding
from eagle_core.errors import ConfigError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.training.config import TrainingConfig
from flows.config.export import RunExportConfig
from flows.config.store import StoreConfig
from flows.doctor import doctor_flow
from flows.errors import ProblemsFoundError
from flows.estimate import estimate_flow
from flows.evaluate import evaluate_flow
from flows.export import export_flow
from flows.hidden_states import hidden_states
from flows.tasks.run_figures import examined_run, run_figures
from flows.train import train_flow
from flows.workspace import Workspace
from tests import tiny
from tests.deployments.cli.terminal import eyas_here

pytestmark = [
    pytest.mark.server,
    pytest.mark.usefixtures("prefect_server", "plots_drawn_once"),
]

TRAINING = TrainingConfig(
    dtype="float32",
    draft_vocab_size=300,
    max_steps=40,
    batch_tokens=1024,
    warmup_steps=2,
    ttt_length=5,
)
EVALUATION = EvaluationConfig(num_prompts=4, num_plain_prompts=1, max_new_tokens=20)
STORE = StoreConfig(shard_tokens=4000, shards_per_task=4)
OTHER_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def answered(target: TargetConfig, path: Path, count: int) -> Path:
    """Write conversations as token ids, with the target's own greedy answers."""
    model, tokenizer = TargetModel.load(target), conversation_tokenizer(target)
    (end,) = tokenizer.stop_ids
    decoding = DecodingConfig(max_new_tokens=24)
    prompts = [
        tokenizer.prompt([Message(role="user", content=f"{number} {tiny.TOPICS[number % 8]}?")])
        for number in range(count)
    ]
    ids = [prompt.tolist() for prompt in prompts]
    lines = []
    texts = generate_plain_batch(model, ids, decoding, tokenizer.stop_ids)
    for prompt, text in zip(ids, texts, strict=True):
        answer = [*text.tokens, end]
        mask = [0] * len(prompt) + [1] * len(answer)
        lines.append(json.dumps({"input_ids": [*prompt, *answer], "loss_mask": mask}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a run is made of."""

    home: Path
    target: TargetConfig
    dataset: DatasetConfig
    training: TrainingConfig = TRAINING
    run: str = "main"

    def train(self) -> "Case":
        """Make its states and train it."""
        hidden_states(self.target, self.dataset, STORE, home=str(self.home))
        train_flow(
            self.target, self.dataset, STORE, self.training, home=str(self.home), run=self.run
        )
        return self

    @property
    def space(self) -> Workspace:
        return Workspace(home=self.home, target=self.target.name, dataset=self.dataset.name)

    def findings(
        self, *, target: TargetConfig | None = None, export: Path | None = None
    ) -> Sequence[Finding]:
        """Examine it, with the target and the export that are served."""
        examined = examined_run(target or self.target, self.space, self.run, EVALUATION)
        root = str(self.space.store_root)
        figures, _ = run_figures(examined, root, EVALUATION, export=export)
        return diagnose(figures)


def problems(findings: Sequence[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.state == "problem"]


def states(findings: Sequence[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


@pytest.fixture(scope="module")
def tiny_target(tiny_target_path: Path) -> TargetConfig:
    return TargetConfig(
        name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu", batch_tokens=512
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_target: TargetConfig) -> Case:
    """A run on the target's own answers, evaluated and exported."""
    folder = tmp_path_factory.mktemp("sound")
    source = answered(tiny_target, folder / "own.jsonl", 60)
    dataset = DatasetConfig(name="own", source=str(source), held_out_fraction=0.2, max_length=256)
    case = Case(home=folder / "home", target=tiny_target, dataset=dataset).train()
    home = str(case.home)
    estimate_flow(tiny_target, dataset, STORE, TRAINING, EVALUATION, home=home)
    evaluate_flow(tiny_target, dataset, TRAINING, EVALUATION, home=home)
    export_flow(tiny_target, dataset, TRAINING, RunExportConfig(), home=home)
    return case


def test_a_sound_run_has_no_problem(sound: Case) -> None:
    found = sound.findings()
    assert problems(found) == []
    unknown = {finding.check for finding in found if finding.state == "unknown"}
    assert unknown == {"engine", "overfit test"}
    for check in ("target", "template", "stop token", "aux layers", "norms", "export", "states"):
        assert states(found)[check] == "ok"
    for check in ("vocabulary", "answers", "decoding", "samples cut"):
        assert states(found)[check] == "ok"


def test_another_template_is_named_first(
    tmp_path: Path, tiny_target: TargetConfig, conversations_path: Path
) -> None:
    template = TemplateConfig(chat_template=OTHER_TEMPLATE)
    dataset = DatasetConfig(
        name="facts", source=str(conversations_path), held_out_fraction=0.2, max_length=256
    )
    served = tiny_target.model_copy(update={"template": template})
    few = TRAINING.model_copy(update={"max_steps": 2})
    case = Case(home=tmp_path, target=served, dataset=dataset, training=few).train()
    found = case.findings()
    assert problems(found)[0] == "template"
    assert r"## assistant:\n" in found[0].found
    assert "<|im_start|>assistant" in found[0].expected
    assert problems(case.findings(target=tiny_target))[0] == "template", "the run has another"


def test_other_layers_are_named_whether_in_the_export_or_in_the_settings(
    sound: Case, tmp_path: Path
) -> None:
    export = tmp_path / "served"
    shutil.copytree(sound.space.run_path("main") / "export", export)
    for name, change in (
        ("serving", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}}),
        ("serving", {"eagle_aux_hidden_state_layer_ids": None}),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}),
    ):
        path = export / name / "config.json"
        text = path.read_text()
        document = {key: value for key, value in {**json.loads(text), **change}.items() if value}
        path.write_text(json.dumps(document))
        found = sound.findings(export=export)
        assert problems(found) == ["aux layers"], change
        assert name in found[0].found
        assert "layers 1, 3, 4, which the run was trained on" in found[0].expected
        path.write_text(text)
    assert problems(sound.findings(export=export)) == []
    others = sound.target.model_copy(update={"aux_layers": (0, 2, 4)})
    found = sound.findings(target=others)
    assert problems(found) == ["aux layers"]
    assert found[0].what_to_do.startswith("set target.aux_layers to [1, 3, 4]")


def test_norms_and_weights_that_are_not_those_of_the_run_are_named(
    sound: Case, tmp_path: Path
) -> None:
    export = tmp_path / "served"
    shutil.copytree(sound.space.run_path("main") / "export" / "serving", export)
    path = export / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fc_norm": True}))
    assert problems(sound.findings(export=export)) == ["norms"]
    shutil.rmtree(export)
    shutil.copytree(sound.space.run_path("main") / "export" / "serving", export)
    assert problems(sound.findings(export=export)) == []
    weights = export / "model.safetensors"
    tensors = load_file(weights)
    name = next(one for one in tensors if one.endswith("fc.weight"))
    save_file({**tensors, name: tensors[name] * 1.1}, weights)
    assert problems(sound.findings(export=export)) == ["export"]
    with pytest.raises(ConfigError, match="is no export: it has no config"):
        sound.findings(export=tmp_path / "elsewhere")


def test_answers_of_another_author_are_named(
    tmp_path: Path, tiny_target: TargetConfig, conversations_path: Path
) -> None:
    dataset = DatasetConfig(
        name="facts", source=str(conversations_path), held_out_fraction=0.2, max_length=256
    )
    found = Case(home=tmp_path, target=tiny_target, dataset=dataset).train().findings()
    assert problems(found)[0] == "answers"
    assert "regenerate" in found[0].what_to_do


@pytest.fixture(scope="module")
def unlearnable(tmp_path_factory: pytest.TempPathFactory, tiny_target: TargetConfig) -> Case:
    """A target whose texts nobody can predict, only learn by heart, and its own answers."""
    folder = tmp_path_factory.mktemp("unlearnable")
    path = folder / "target"
    shutil.copytree(tiny_target.model, path)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                weight.mul_(8)
    model.save_pretrained(path)
    target = tiny_target.model_copy(update={"model": str(path)})
    source = answered(target, folder / "few.jsonl", 16)
    dataset = DatasetConfig(name="few", source=str(source), held_out_fraction=0.5, max_length=256)
    return Case(home=folder / "home", target=target, dataset=dataset)


def test_a_vocabulary_that_is_too_small_is_named(unlearnable: Case) -> None:
    training = TRAINING.model_copy(update={"draft_vocab_size": 40, "max_steps": 5})
    found = replace(unlearnable, training=training, run="narrow").train().findings()
    assert problems(found)[0] == "vocabulary"
    assert "training.draft_vocab_size" in found[0].what_to_do


def test_a_draft_that_fits_only_its_samples_is_named(unlearnable: Case) -> None:
    training = TRAINING.model_copy(
        update={"max_steps": 120, "learning_rate": 3e-3, "ttt_length": 1, "start": "random"}
    )
    found = replace(unlearnable, training=training).train().findings()
    assert problems(found)[0] == "held out"
    assert "more conversations" in found[0].what_to_do


def test_overfitting_proves_that_training_and_decoding_agree(
    sound: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = doctor_flow(
        sound.target, sound.dataset, STORE, EVALUATION, home=str(sound.home), overfit=True
    )
    assert states(summary.findings)["overfit test"] == "ok"
    assert "training and decoding agree" in capsys.readouterr().out


def test_the_command_takes_a_folder_and_exits_with_1_on_a_problem(sound: Case) -> None:
    folder = str(sound.space.run_path("main"))
    ended = eyas_here("doctor", folder)
    assert ended.returncode == 0
    assert "Other checks" in ended.stdout
    assert "problem: " not in ended.stdout
    ended = eyas_here("doctor", folder, "--set", "target.aux_layers=[0,2,4]")
    assert ended.returncode == 1
    assert "problem: aux layers" in ended.stdout
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ProblemsFoundError: run main: 1 problem: aux layers; 2 not checked")


def test_without_store_and_token_files_the_checks_say_what_they_lack(
    sound: Case, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(sound.home / "runs", home / "runs")
    found = states(replace(sound, home=home).findings())
    for check in ("template", "stop token", "states", "answers", "vocabulary", "samples cut"):
        assert found[check] == "unknown"
    assert found["held out"] != "unknown", "training recorded both accuracies"
    assert "problem" not in found.values()
    with pytest.raises(ConfigError, match=r"no run in .*; runs there: tiny-own-main"):
        replace(sound, home=home, run="other").findings()


def test_a_truncated_token_file_leaves_its_checks_undone(sound: Case, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(sound.home, home)
    case = replace(sound, home=home)
    tokens = examined_run(case.target, case.space, case.run, EVALUATION).run.tokens
    for split in ("train", "held_out"):
        path = case.space.token_file(split, tokens)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[:-200])
        found = case.findings()
        assert states(found)["template"] == "unknown"
        assert problems(found) == []


def test_a_target_of_another_size_is_a_problem_of_the_target(
    sound: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other"
    shutil.copytree(sound.target.model, path)
    config = LlamaForCausalLM.from_pretrained(path).config
    config.head_dim = 2 * config.head_dim
    LlamaForCausalLM(config).save_pretrained(path)
    other = sound.target.model_copy(update={"model": str(path)})
    with pytest.raises(ProblemsFoundError, match="1 problem: target"):
        doctor_flow(other, sound.dataset, STORE, EVALUATION, home=str(sound.home))
    assert "head_dim is" in capsys.readouterr().out
