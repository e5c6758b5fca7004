"""Which template a conversation is rendered with."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.tool_calls import ToolCall
from eagle_core.errors import ConfigError
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from tests.tiny import CHAT_TEMPLATE

TOOL_TEMPLATE = (
    "{{ tools | tojson if tools else '' }}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = '[{"type": "function", "function": {"name": "sky", "parameters": {}}}]'


def ask(tools: str = "") -> Conversation:
    question = Message(role="user", content="Rain?")
    return Conversation(
        conversation_id="c",
        messages=(question, Message(role="assistant", content="Yes.")),
        tools=tools,
    )


def text(tokenizer: ConversationTokenizer, conversation: Conversation) -> str:
    return tokenizer.decode(tokenizer.tokenize(conversation)[0].input_ids)


@pytest.fixture
def named(
    smollm2_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> PreTrainedTokenizerBase:
    templates = {"default": CHAT_TEMPLATE, "tool_use": TOOL_TEMPLATE, "rag": "{{ nothing }}"}
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", templates)
    return smollm2_tokenizer


def test_named_templates_are_chosen_as_servers_choose_them(named: PreTrainedTokenizerBase) -> None:
    ours = ConversationTokenizer(named)
    messages = [{"role": "user", "content": "Rain?"}]
    for tools in ("", TOOLS):
        served = named.apply_chat_template(
            messages,
            tools=json.loads(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=True,
        )
        found = ours.decode(ours.prompt([Message(role="user", content="Rain?")], tools=tools))
        assert found == served
        assert text(ours, ask(tools)).startswith(served[:40])
    plain = ConversationTokenizer(named, TemplateConfig(chat_template=CHAT_TEMPLATE))
    assert ours.masks_fingerprint != plain.masks_fingerprint
    assert ours.decode(ours.prompt(ask().messages[:1], tools=TOOLS)) != ours.decode(
        ours.prompt(ask().messages[:1])
    )


def test_calls_are_written_by_the_template_for_tools(named: PreTrainedTokenizerBase) -> None:
    call = ToolCall(name="sky", arguments="{}")
    answer = Message(role="assistant", content="So:", tool_calls=(call,))
    conversation = Conversation(
        conversation_id="c", messages=(ask().messages[0], answer), tools=TOOLS
    )
    assert "So:[sky]<|im_end|>" in text(ConversationTokenizer(named), conversation)


def test_another_template_for_tools_gives_other_samples_of_the_same_store(
    named: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ConversationTokenizer(named)
    templates = {"default": CHAT_TEMPLATE, "tool_use": "You may call. " + TOOL_TEMPLATE}
    monkeypatch.setattr(named, "chat_template", templates)
    after = ConversationTokenizer(named)

    def sample_ids(ours: ConversationTokenizer, tools: str) -> list[str]:
        return [one.sample_id for one in ours.tokenize(ask(tools))]

    assert sample_ids(after, "") == sample_ids(before, "")
    assert sample_ids(after, TOOLS) != sample_ids(before, TOOLS)
    assert after.masks_fingerprint != before.masks_fingerprint, "other token files"
    monkeypatch.setattr(named, "chat_template", CHAT_TEMPLATE)
    without = ConversationTokenizer(named)
    fingerprints = {one.template_fingerprint for one in (before, after, without)}
    assert len(fingerprints) == 1, "the store stays valid"


@pytest.mark.parametrize("templates", [{"tool_use": TOOL_TEMPLATE}, {}, {"default": ""}])
def test_named_templates_without_a_default_are_refused(
    smollm2_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    templates: dict[str, str],
) -> None:
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", templates)
    with pytest.raises(ConfigError, match=r"no chat template|but no `default`"):
        ConversationTokenizer(smollm2_tokenizer)


def test_a_path_is_read_and_moving_the_file_changes_nothing(
    smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ConversationTokenizer(smollm2_tokenizer, TemplateConfig(chat_template=CHAT_TEMPLATE))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.jinja").write_text(CHAT_TEMPLATE)
    for path in (str(tmp_path / "own.jinja"), "~/own.jinja"):
        ours = ConversationTokenizer(smollm2_tokenizer, TemplateConfig(chat_template=path))
        assert ours.masks_fingerprint == given.masks_fingerprint
        assert ours.template_fingerprint == given.template_fingerprint
        assert text(ours, ask()) == text(given, ask())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no/such/file.jinja", "neither Jinja text nor a file"),
        ("chatml", "neither Jinja text nor a file"),
        ("one line\nand another", "has no Jinja in it"),
        (".", "neither Jinja text nor a file"),
    ],
)
def test_what_is_no_template_is_refused(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ConversationTokenizer(smollm2_tokenizer, TemplateConfig(chat_template=template))


@pytest.mark.parametrize("content", [b"no jinja", b"\xff\xfe\x00"])
def test_a_file_that_is_no_template_is_named(
    smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"own\.jinja"):
        ConversationTokenizer(smollm2_tokenizer, TemplateConfig(chat_template=str(path)))
