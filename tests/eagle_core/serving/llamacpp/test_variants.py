"""Real llama.cpp accepts, round by round, what Eyas accepts, for each variant that it has.

make test-engine
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_speculative
from eagle_core.decoding.trace import GenerationTrace
from eagle_core.draft.export import ServedTarget, export
from eagle_core.draft.export_config import ExportConfig
from eagle_core.draft.model import DraftModel
from eagle_core.draft.readers import lacking
from eagle_core.evaluation.measure_engine import engine_server
from eagle_core.serving.llamacpp.server import LlamaCppEngine
from eagle_core.serving.served import Served
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import aux_layers
from tests.eagle_core.draft.variants import VARIANTS, make_variant
from tests.served_target import write_served_target

PYTHON = os.environ.get("EYAS_VLLM_PYTHON")
SPOKEN = range(100, 116)
"""The tokens that the target says, of which a random draft finds some."""
PROMPTS = (list(range(100, 107)), [100 + (n * n + 3 * n) % 16 for n in range(40)], [109] * 9)
DECODING = DecodingConfig(max_new_tokens=32, draft_tokens=4)

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="of the engines; CONTRIBUTING.md: make test-engine"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    """A random target that says few of its tokens, with a tokenizer that llama.cpp knows."""
    folder = tmp_path_factory.mktemp("target")
    write_served_target(folder, SPOKEN)
    return TargetConfig(name="few-words", model=str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_llamacpp_counts_the_same_rounds(target: TargetConfig, tmp_path: Path, name: str) -> None:
    folder = weights.locate(target)
    draft = make_variant(folder, VARIANTS[name], draft_vocab_size=16, tokens=SPOKEN)
    if lacking("llamacpp", draft.config):
        pytest.skip("llama.cpp lacks it, and the conversion is refused")
    draft, expected = _lucky(TargetModel.load(target), folder, VARIANTS[name])
    target_config = AutoConfig.from_pretrained(folder)
    described = ServedTarget.of(
        target_config, name_or_path=str(folder), aux_layers=aux_layers(target, 8)
    )
    settings = ExportConfig(dtype="float32", layouts=("serving",))
    served = Served(
        target=target,
        weights=folder,
        draft=export(draft, described, tmp_path, settings)["serving"],
        draft_tokens=DECODING.draft_tokens,
        max_length=128,
    )
    with engine_server(LlamaCppEngine(target), served) as decoder:
        found = [decoder.decode(prompt, DECODING, (), is_alone=True) for prompt in PROMPTS]
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.accepted for one in found] == [one.accepted for one in expected]


def _lucky(
    model: TargetModel, folder: Path, changes: Mapping[str, Any]
) -> tuple[DraftModel, list[GenerationTrace]]:
    """Return a random draft of which some tokens are accepted, and what we decode with it."""
    for seed in range(30):
        draft = make_variant(folder, changes, draft_vocab_size=16, seed=seed, tokens=SPOKEN)
        expected = [generate_speculative(model, draft, prompt, DECODING) for prompt in PROMPTS]
        if any(sum(one.accepted) for one in expected):
            return draft, expected
    pytest.fail("no random draft finds a token")
