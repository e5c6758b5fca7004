"""Questions in the forms that benchmarks have, as the target's own template renders them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from eagle_core.errors import ConfigError, CorruptError
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
        {
            "messages": [
                {"role": "user", "content": "Tell me about rivers."},
                {"role": "bot", "content": "They flow."},
            ]
        },
        {"prompt": [{"role": "user", "content": "Tell me about rivers."}], "completion": None},
        {"question": "Tell me about rivers.", "answer": 42},
        {"problem": "Tell me about rivers.", "solution": ["They flow."], "text": "A river."},
        {"text": "Tell me about rivers.", "prompt": None},
        {"instruction": "Tell me about rivers.", "input": ""},
        {"messages": None, "query": "Tell me about rivers."},
    ],
    ids=[
        "column",
        "turns",
        "messages",
        "conversations",
        "answered",
        "another name of the assistant",
        "trl",
        "answer in numbers",
        "answer in a list",
        "text",
        "alpaca without input",
        "messages in null",
    ],
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
    ("record", "context"),
    [
        ({"instruction": "Sum up.", "input": "A text."}, ["user\nSum up.\nA text."]),
        (
            {"history": [["Rain?", "Yes."]], "instruction": "Where?", "output": "Here."},
            ["user\nRain?", "assistant\nYes.", "user\nWhere?"],
        ),
        ({"system": "Be brief.", "prompt": "Rain?"}, ["system\nBe brief.", "user\nRain?"]),
    ],
)
def test_a_prompt_is_all_that_the_target_is_asked(
    tmp_path: Path, tokenizer: ConversationTokenizer, record: dict[str, object], context: list[str]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (prompt,) = read_prompts(str(path), tokenizer)
    turns = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in context)
    assert tokenizer.decode(np.array(prompt.input_ids)) == turns + "<|im_start|>assistant\n"


USER = {"role": "user", "content": "Tell me about rivers."}
ANSWER = {"role": "assistant", "content": "They flow."}
LATER = {"role": "user", "content": "Where?"}
GREETING = {"role": "bot", "content": "Hello."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "map"}}]}
SHAREGPT = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "They flow."}]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("column", "turns"),
    [
        ("prompt", [USER, ANSWER]),
        ("prompt", [USER, ANSWER, LATER, ANSWER]),
        ("prompt", [USER, CALL, {"role": "tool", "content": "A map."}]),
        ("prompt", [GREETING, USER, ANSWER]),
        ("question", SHAREGPT),
        ("instruction", [USER, ANSWER]),
        ("message_1", [USER, ANSWER]),
        ("input", SHAREGPT),
        ("messages", [USER, ANSWER, LATER, ANSWER]),
        ("messages", [USER, ANSWER, LATER]),
        ("messages", [GREETING, USER, {"role": "bot", "content": 7}]),
        ("messages", [{"input": USER["content"], "output": "They flow."}]),
        ("conversations", SHAREGPT * 2),
        ("conversation", [json.dumps(USER), json.dumps(ANSWER)]),
        ("turns", [USER["content"], "And lakes?"]),
        ("turns", [USER, ANSWER]),
    ],
)
def test_no_form_lets_an_answer_into_the_prompt(
    tmp_path: Path,
    tokenizer: ConversationTokenizer,
    column: str,
    turns: list[object],
    *,
    as_text: bool,
) -> None:
    record = {column: json.dumps(turns) if as_text else turns}
    (tmp_path / "questions.jsonl").write_text(json.dumps(record) + "\n")
    with (tmp_path / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", column], ["1", json.dumps(turns)]])
    for name in ("questions.jsonl", "questions.csv"):
        (prompt,) = read_prompts(str(tmp_path / name), tokenizer)
        assert tokenizer.decode(np.array(prompt.input_ids)) == ASKED


def test_turns_in_the_column_text_are_no_text_of_the_user(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"text": json.dumps([USER, ANSWER])}) + "\n")
    (prompt,) = read_prompts(str(path), tokenizer)
    assert tokenizer.decode(np.array(prompt.input_ids)) == ASKED


@pytest.mark.parametrize("as_text", [False, True])
def test_turns_of_a_prompt_that_end_in_a_question_are_all_asked(
    tmp_path: Path, tokenizer: ConversationTokenizer, *, as_text: bool
) -> None:
    """The answers before the last question are its context, as those of `history` are."""
    turns = [USER, ANSWER, LATER]
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": json.dumps(turns) if as_text else turns}) + "\n")
    (prompt,) = read_prompts(str(path), tokenizer)
    assert tokenizer.decode(np.array(prompt.input_ids)) == (
        f"{ASKED}They flow.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_json_of_other_objects_is_the_question_itself(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    asked = json.dumps([{"from": "Berlin", "to": "Ulm"}, {"from": "gpt", "to": "Rome"}])
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": asked}) + "\n")
    (prompt,) = read_prompts(str(path), tokenizer)
    assert asked in tokenizer.decode(np.array(prompt.input_ids))


@pytest.mark.parametrize("name", ["questions.json", "questions.jsonl"])
@pytest.mark.parametrize(
    ("prompt", "why"),
    [('"' + "x" * (17 << 20) + '"', "16777216"), ("7" * 5000, "more than 4300 digits")],
    ids=["long", "digits"],
)
def test_a_question_that_is_too_large_is_named(
    tmp_path: Path, tokenizer: ConversationTokenizer, name: str, prompt: str, why: str
) -> None:
    records = ['{"prompt": "Well?"}', f'{{"prompt": {prompt}}}']
    text = json.dumps({"data": ["HERE"]}).replace('"HERE"', ", ".join(records))
    (tmp_path / name).write_text("\n".join(records) if name.endswith("l") else text)
    prompts = read_prompts(str(tmp_path / name), tokenizer)
    next(prompts)
    with pytest.raises(CorruptError, match=rf"{name}, record 1.*too_large.*{why}"):
        next(prompts)


def test_tools_are_offered_as_in_serving(tmp_path: Path, tiny_target_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_target_path)
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]
    template = "{{ tools | tojson if tools else '' }}" + plain.chat_template
    tokenizer = ConversationTokenizer(plain, TemplateConfig(chat_template=template))
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": "Rain?", "tools": tools}) + "\n")
    (prompt,) = read_prompts(str(path), tokenizer)
    assert '"name": "sky"' in tokenizer.decode(np.array(prompt.input_ids))


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


@pytest.mark.parametrize(
    "record",
    [
        {"answer": "Rivers."},
        {"messages": [{"role": "assistant", "content": "Hello."}]},
        {"messages": [{"role": "system", "content": "Be brief."}]},
        {"prompt": "  "},
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
    ],
)
def test_what_is_no_question_is_named(
    tmp_path: Path, tokenizer: ConversationTokenizer, record: dict[str, object]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "Well?"}\n' + json.dumps(record) + "\n")
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


def test_a_damaged_file_is_named_without_settings_that_prompts_lack(
    tmp_path: Path, tokenizer: ConversationTokenizer
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Well?"}\n{"prompt": \n')
    with pytest.raises(CorruptError, match=r"prompts\.jsonl.*broken_json") as caught:
        list(read_prompts(str(path), tokenizer))
    assert "accept_" not in str(caught.value)
