"""Exports in real vLLM: it must say what the target says and draft, token for token, what we draft.

make test-engine
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from eagle_core.decoding.chain_drafter import ChainDrafter, Proposal
from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_speculative
from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig, TensorLayout
from eagle_core.draft.model import DraftModel
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import aux_layers
from tests.eagle_core.draft.test_export import make_draft
from tests.eagle_core.draft.variants import VARIANTS, make_variant

PYTHON = os.environ.get("EYAS_VLLM_PYTHON")
PROBE = Path(__file__).with_name("vllm_probe.py")
PROMPTS = ([1, 2, 3, 4, 5, 6, 7], list(range(40, 80)), [400] * 9)
DECODING = DecodingConfig(max_new_tokens=16, draft_tokens=4)
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3-rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}

Decoded = tuple[list[int], list[list[int]]]
"""The new tokens after a prompt, and every chain that was drafted."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM; see CONTRIBUTING.md: make test-engine"),
]


VARIANT_PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [(n * n + 3 * n) % 16 for n in range(40)], [9] * 9)
"""Of a target of 16 tokens, of which a random draft finds some. They outgrow every window and every
original length of a rotary embedding."""
VARIANT_EXPORTS: tuple[tuple[str, TensorLayout], ...] = (
    *((name, "serving") for name in VARIANTS),
    *((name, "speculators") for name in ("layers", "norm_before_residual", "many-qwen3")),
)


class Vllm:
    """A process that loads one export after the other: to start it takes longer than a draft does.

    A new one comes for one that died.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._answers: IO[str] | None = None

    def decode(
        self, target: Path, draft: Path, layout: TensorLayout, prompts: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return the tokens and every chain that was drafted, by prompt; or the error."""
        if self._process is None or self._answers is None:
            self._process, self._answers = self._started()
        request = {
            "target": str(draft if layout == "speculators" else target),
            "draft": str(draft),
            "layout": layout,
            "prompts": prompts,
            "draft_tokens": DECODING.draft_tokens,
            "max_new_tokens": DECODING.max_new_tokens,
        }
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead: no answer will come
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            status = self._process.wait()
            self.close()
            return {"error": f"vLLM ended with {status}: {self._log.read_text()[-8000:]}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> tuple["subprocess.Popen[str]", IO[str]]:
        assert PYTHON is not None
        reading, writing = os.pipe()
        with self._log.open("w") as log:
            process = subprocess.Popen(
                [PYTHON, PROBE, str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                pass_fds=[writing],
            )
        os.close(writing)
        return process, os.fdopen(reading)

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._answers is not None:
            self._process.kill()
            self._process.communicate()
            self._answers.close()
        self._process = self._answers = None


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """The vLLM of all tests here."""
    started = Vllm(tmp_path_factory.mktemp("vllm") / "log.txt")
    yield started
    started.close()


@pytest.mark.parametrize("name", TARGETS)
def test_drafts_of_every_kind_of_target(vllm: Vllm, tmp_path: Path, name: str) -> None:
    target = _write_target(tmp_path / "target", name)
    _require_the_same(vllm, target, make_draft(target), "serving", tmp_path)


@pytest.mark.parametrize("layout", ["serving", "speculators"])
@pytest.mark.parametrize("draft_vocab_size", [200, 512], ids=["pruned", "full"])
@pytest.mark.parametrize("norms", [False, True], ids=["eagle3", "eagle3.1"])
def test_every_kind_of_draft(
    vllm: Vllm, tmp_path: Path, norms: bool, draft_vocab_size: int, layout: TensorLayout
) -> None:
    target = _write_target(tmp_path / "target", "llama")
    draft = make_draft(target, draft_vocab_size=draft_vocab_size, norms=norms)
    _require_the_same(vllm, target, draft, layout, tmp_path)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An export of a variant, and what we decode with it after each prompt."""

    target: Path
    export: Path
    ours: list[Decoded]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Variant]:
    """All variants by name and layout."""
    folder = tmp_path_factory.mktemp("variants")
    target = _write_target(folder / "target", "llama", vocab_size=16)
    config, served = _described(target)
    model = TargetModel.load(config)
    made = {}
    for name, layout in VARIANT_EXPORTS:
        draft = make_variant(target, VARIANTS[name], draft_vocab_size=12)
        made[name, str(layout)] = Variant(
            target=target,
            export=_export(draft, served, folder / f"{name}-{layout}", layout),
            ours=[_here(model, draft, prompt) for prompt in VARIANT_PROMPTS],
        )
    return made


@pytest.mark.parametrize(("name", "layout"), VARIANT_EXPORTS)
def test_every_variant_of_a_draft(
    vllm: Vllm, variants: dict[tuple[str, str], Variant], name: str, layout: TensorLayout
) -> None:
    variant = variants[name, layout]
    found = vllm.decode(variant.target, variant.export, layout, VARIANT_PROMPTS)
    _require_equal(found, variant.ours)


def test_what_is_compared_differs_and_is_sometimes_accepted(
    variants: dict[tuple[str, str], Variant],
) -> None:
    plain = variants["plain", "serving"].ours
    for name in ("window", "linear", "llama3", "yarn", "own-yarn", "norm_before_residual"):
        assert variants[name, "serving"].ours != plain, name  # with the same tensors
    assert variants["dynamic", "serving"].ours == plain  # up to max_position_embeddings
    rounds = [[len(drafted) for _, drafted in one.ours] for one in variants.values()]
    is_accepting = [min(numbers) < DECODING.max_new_tokens - 1 for numbers in rounds]
    assert sum(is_accepting) > len(rounds) / 2


def _write_target(folder: Path, name: str, **changes: int) -> Path:
    """Write a random target whose words are far enough apart for rounding not to matter."""
    sizes = {**SIZES, "model_type": name, **TARGETS[name], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return folder


def _described(target: Path) -> tuple[TargetConfig, ServedTarget]:
    model_config: PretrainedConfig = AutoConfig.from_pretrained(target)
    config = TargetConfig(
        name="tiny",
        model=str(target),
        dtype="float32",
        device="cpu",
        attention="eager" if model_config.model_type == "gpt_oss" else "sdpa",
    )
    served = ServedTarget.of(
        model_config,
        name_or_path=str(target),
        aux_layers=aux_layers(config, model_config.num_hidden_layers),
    )
    return config, served


def _export(draft: DraftModel, served: ServedTarget, folder: Path, layout: TensorLayout) -> Path:
    settings = ExportConfig(
        dtype="float32", layouts=(layout,), speculative_tokens=DECODING.draft_tokens
    )
    return export(draft, served, folder, settings)[layout]


def _require_the_same(
    vllm: Vllm, target: Path, draft: DraftModel, layout: TensorLayout, tmp_path: Path
) -> None:
    config, served = _described(target)
    folder = _export(draft, served, tmp_path / "export", layout)
    found = vllm.decode(target, folder, layout, PROMPTS)
    model = TargetModel.load(config)
    _require_equal(found, [_here(model, draft, prompt) for prompt in PROMPTS])


def _require_equal(found: Mapping[str, Any], ours: Sequence[Decoded]) -> None:
    assert "error" not in found, found["error"]
    for place, (tokens, drafted) in enumerate(ours):
        assert found["tokens"][place] == tokens
        # Equal texts and chains are equal rounds: as many drafted tokens are accepted in each.
        assert len(drafted) >= DECODING.max_new_tokens / (DECODING.draft_tokens + 1) - 1
        assert found["drafted"][place][: len(drafted)] == drafted


def _here(target: TargetModel, draft: DraftModel, prompt: Sequence[int]) -> Decoded:
    """Return the new tokens and every chain that was drafted."""
    drafted: list[list[int]] = []
    propose = ChainDrafter.propose

    def heard(drafter: ChainDrafter, num_tokens: int) -> list[Proposal]:
        (proposal,) = propose(drafter, num_tokens)
        drafted.append(list(proposal.tokens))
        return [proposal]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChainDrafter, "propose", heard)
        trace = generate_speculative(target, draft, prompt, DECODING)
    return list(trace.tokens), drafted
