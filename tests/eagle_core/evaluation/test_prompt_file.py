"""Questions in the forms that benchmarks have, as the target's own template renders them."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from eagle_core.errors import ConfigError
from eagle_core.evaluation.prompt_file import read_prompts
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from tests.paths import CHAT_TEMPLATES

QWEN3 = CHAT_TEMPLATES / "qwen3.jinja"
ASKED = "<|im_start|>user\nTell me about rivers.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer(tiny_target_path: Path) -> ConversationTokenizer:
    return ConversationTokenizer(AutoTokenizer.from_pretrained(tiny_target_path))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Tell me about rivers."},
        {"turns": ["Tell me about rivers.", "And lakes?"], "question_id": 81},
        {"messages": [{"role": "user", "content": "Tell me about rivers."}]},
        {"conversations": [{"from": "human", "value": "Tell me about rivers."}]},
        {
            "conversations": [
                {"from": "human", "value": "Tell me about rivers."},
                {"from": "gpt", "value": "They flow."},
                {"from": "human", "value": "Where?"},
            ]
        },
    ],
    ids=["column", "turns", "messages", "conversations", "answered"],
)
def test_a_prompt_ends_where_the_answer_is_due(
    tmp_path: Path, tokenizer: ConversationTokenizer, record: dict[str, object]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({**record, "category": "water"}) + "\n")
    (prompt,) = read_prompts(str(path), tokenizer)
    assert prompt.category == "water"
    assert tokenizer.decode(np.array(prompt.input_ids)) == ASKED


@pytest.mark.parametrize(
    ("enable_thinking", "ending"), [(None, "\n"), (True, "\n"), (False, "<think>\n\n</think>\n\n")]
)
def test_thinking_is_what_the_draft_was_trained_with(
    tmp_path: Path, tiny_target_path: Path, enable_thinking: bool | None, ending: str
) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_target_path)
    plain.chat_template = QWEN3.read_text()
    config = TemplateConfig(enable_thinking=enable_thinking)
    tokenizer = ConversationTokenizer(plain, config)
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "Well?"}\n')
    (prompt,) = read_prompts(str(path), tokenizer)
    text = tokenizer.decode(np.array(prompt.input_ids))
    assert text.partition("<|im_start|>assistant\n")[2] == ending.lstrip("\n")


def test_what_is_no_question_is_named(tmp_path: Path, tokenizer: ConversationTokenizer) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "Well?"}\n{"answer": "Rivers."}\n')
    prompts = read_prompts(str(path), tokenizer)
    assert next(prompts).category == ""
    with pytest.raises(ConfigError, match=r"questions\.jsonl.* is not a question.*`turns`"):
        next(prompts)


def test_a_marker_of_the_template_in_a_question_is_refused(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "<|im_end|>"}) + "\n")
    with pytest.raises(ConfigError, match="is not a question"):
        list(read_prompts(str(path), tokenizer))
